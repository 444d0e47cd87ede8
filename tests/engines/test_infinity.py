"""The engine of infinity-emb, which has a Python of its own: one process of that finds out what is tested."""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gallama.config import ModelSpec
from gallama.engines import EMBEDDERS
from gallama.engines.infinity import InfinityOptions, divide, split
from gallama.errors import MissingExtra

SECONDS = 300


@pytest.fixture(scope="module")
def found(
    embedding_python: str, minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    script = Path(__file__).with_name("infinity_findings.py")
    process = subprocess.run(
        [embedding_python, str(script), str(minilm_folder), str(tmp_path_factory.mktemp("models"))],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert process.returncode == 0, process.stderr
    findings: dict[str, Any] = json.loads(process.stdout)
    assert not [each for each in findings.values() if "broken" in each], process.stderr
    return findings


@pytest.mark.parametrize("which", ["plain", "short passes", "left padding", "prompt", "lower case"])
def test_vectors_are_those_of_the_models_own_library(found: dict[str, Any], which: str) -> None:
    assert found["own_library"][which] < 1e-4


def test_weights_may_be_less_exact(found: dict[str, Any]) -> None:
    assert 1e-4 < found["own_library"]["bfloat16"] < 0.02


def test_token_ids_are_taken_as_they_are(found: dict[str, Any]) -> None:
    of = found["token_ids"]
    assert of["equal"]
    assert of["counted"][0] == of["counted"][1] == of["counted"][2]
    assert of["alone"] == 3


def test_texts_and_token_ids_may_stand_in_one_request(found: dict[str, Any]) -> None:
    assert found["token_ids"]["mixed"] < 1e-5


def test_token_ids_that_the_model_does_not_have_are_refused(found: dict[str, Any]) -> None:
    assert found["token_ids"]["unknown"] == {
        "class": "InvalidRequest",
        "message": "`input[1]` has the token 30522; the model's are 0 to 30521.",
        "param": "input",
    }
    assert found["token_ids"]["none"]["message"] == "`input[0]` has no token."


def test_tokens_have_texts_and_special_ones_names(found: dict[str, Any]) -> None:
    assert found["token_ids"]["special"] == [1037, 4937]
    assert found["token_ids"]["texts"] == "[CLS]ing cats[SEP]"
    assert found["token_ids"]["of nothing"] == [[], []]


def test_a_text_may_have_as_many_tokens_as_the_model_takes(found: dict[str, Any]) -> None:
    assert found["lengths"]["limit"] == found["lengths"]["just fits"] == 256


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("text", "`input[2]` has 302 tokens; the model takes 256."),
        ("ids", "`input[0]` has 300 tokens; the model takes 256."),
        ("characters", "`input[0]` has 10000000 characters; the model takes 256 tokens."),
        ("late", "`input[100]` has 302 tokens; the model takes 256."),
    ],
)
def test_a_text_that_is_too_long_is_named(found: dict[str, Any], which: str, message: str) -> None:
    assert found["lengths"][which] == {"class": "TextTooLong", "message": message, "param": "input"}


def test_nothing_is_computed_of_a_request_with_a_text_that_is_too_long(found: dict[str, Any]) -> None:
    assert found["lengths"]["steps"] == 1, "only the text that just fits"


def test_the_limit_may_be_raised_to_what_the_model_can_compute(found: dict[str, Any]) -> None:
    assert found["lengths"]["longer"] == 512
    assert found["lengths"]["too long"].startswith("InvalidConfig: `max_seq_len` is 513")


def test_requests_at_the_same_time_share_forward_passes(found: dict[str, Any]) -> None:
    assert found["concurrent"]["steps"] < 64
    assert found["concurrent"]["steps alone"] == 64
    assert found["concurrent"]["busy"] == [0, 0]


def test_a_text_has_the_same_vector_whoever_is_in_its_batch(found: dict[str, Any]) -> None:
    assert found["concurrent"]["distance"] < 1e-5


def test_what_nobody_waits_for_any_more_is_not_computed(found: dict[str, Any]) -> None:
    of = found["cancelled"]
    assert of["cancelled"] == 16
    assert of["busy"] == [16, 0]
    assert of["waiting"] == 0
    assert of["steps"] <= 8, "16 calls of 32 texts, 4 in a batch, would take 128"


def test_closing_tells_those_who_wait(found: dict[str, Any]) -> None:
    assert found["closed"] == {"classes": ["WorkerUnavailable"] * 3, "busy": 0}


def test_a_small_request_does_not_wait_for_all_of_a_large_one(found: dict[str, Any]) -> None:
    assert found["long_calls"]["all"] >= 200
    assert found["long_calls"]["before small"] < 50


def test_a_forward_pass_that_fails_is_an_error_and_the_next_one_works(found: dict[str, Any]) -> None:
    of = found["failing_passes"]
    assert of["failed"]["class"] == "WorkerUnavailable"
    assert of["answered"] == 1
    assert of["steps"] == 2


def test_scores_are_those_of_the_models_own_library(found: dict[str, Any]) -> None:
    assert found["ranking"]["distance"] < 1e-4
    assert found["ranking"]["spread"] > 0.01, "else all would be equal"


def test_a_pair_counts_with_its_special_tokens(found: dict[str, Any]) -> None:
    assert found["ranking"]["one"] == -1, "one start for both texts"


def test_a_pair_that_is_too_long_is_named(found: dict[str, Any]) -> None:
    assert found["ranking"]["long"] == {
        "class": "TextTooLong",
        "message": "The query and `documents[1]` have 305 tokens; the model takes 256.",
        "param": "documents",
    }


def test_a_model_that_ranks_does_not_embed_and_the_other_way_round(found: dict[str, Any]) -> None:
    assert found["ranking"]["embed"]["class"] == found["not_ranking"]["class"] == "UnsupportedValue"
    assert found["ranking"]["dimensions"] == 0


def test_shorter_vectors_are_those_that_the_models_files_or_the_spec_name(found: dict[str, Any]) -> None:
    assert found["shorter"] == {
        "none": [],
        "config": [64],
        "any": "any",
        "asked": [64, 128],
        "asked any": "any",
        "too many": "InvalidConfig: `backend_extra_args.matryoshka_dimensions` has 512; the vectors have"
        " 384.",
    }


@pytest.mark.parametrize(
    ("which", "start"),
    [
        ("code", "ModelLoadFailed: The model needs Python code beside its weights: code.Model."),
        ("classifier", "ModelLoadFailed: The model is for classify;"),
        ("no config", "ModelLoadFailed: "),
        ("unknown reading", "ModelLoadFailed: The model reads texts in a way"),
        (
            "argument",
            "InvalidConfig: `backend_extra_args.pooling`: Extra inputs are not permitted. The embedding",
        ),
        ("value", "InvalidConfig: `backend_extra_args.batch_size`: Input should be greater than"),
        ("device", "InvalidConfig: `backend_extra_args.device` is cuda, which torch does not see."),
    ],
)
def test_what_cannot_be_loaded_is_refused(found: dict[str, Any], which: str, start: str) -> None:
    assert found["refused_models"][which].startswith(start)


def test_the_library_leaves_nothing_behind_and_calls_nobody(found: dict[str, Any]) -> None:
    assert found["surroundings"] == {"files": [], "handlers": 0, "offline": "1", "telemetry": False}


def test_a_python_without_the_library_is_told_how_to_get_it(minilm_folder: Path) -> None:
    spec = ModelSpec(model_id=str(minilm_folder), backend="embedding")
    with pytest.raises(MissingExtra, match="gallama setup embedding"):
        EMBEDDERS["embedding"](spec, minilm_folder)


def test_every_setting_is_documented_with_its_default() -> None:
    document = (Path(__file__).parents[2] / "docs/embeddings.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| `?(\w+)", document, re.MULTILINE))
    assert documented.keys() == InfinityOptions.model_fields.keys()
    chosen = {name: field.default for name, field in InfinityOptions.model_fields.items() if field.default}
    assert {name: documented[name] for name in chosen} == {name: str(value) for name, value in chosen.items()}


def test_texts_of_alike_lengths_share_a_pass() -> None:
    assert split([3, 100, 5, 90, 4], 10_000, pass_tokens=50) == [[3, 1], [0, 4, 2]]


def test_texts_are_not_divided_where_a_pass_costs_more_than_padding() -> None:
    assert split([3, 100, 5, 90, 4], 10_000, pass_tokens=1000) == [[0, 4, 2, 3, 1]]


def test_no_pass_has_more_than_its_tokens_with_padding() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
        parts = split(lengths, 200, pass_tokens=rng.choice([0, 10, 1000]))
        assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
        assert all(len(part) * max(lengths[index] for index in part) <= 200 for part in parts)


def test_a_text_that_is_too_long_for_a_pass_has_one_of_its_own() -> None:
    assert split([500, 2, 300], 200, pass_tokens=0) == [[0], [2], [1]]


def test_no_texts_need_no_pass() -> None:
    assert split([], 200, pass_tokens=0) == []


@pytest.mark.parametrize("seed", range(50))
def test_passes_are_halved_until_there_are_enough_or_they_are_small(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 40))]
    parts = split(lengths, 16384, 64)
    divided = divide(parts, lengths, 4, 64)
    sizes = [len(part) * max(lengths[index] for index in part) for part in divided]
    assert sorted(index for part in divided for index in part) == list(range(len(lengths)))
    assert sizes == sorted(sizes, reverse=True)
    assert len(parts) <= len(divided) <= max(4, len(parts))
    assert len(divided) >= 4 or sizes[0] < 128 or len(divided[0]) == 1
