"""The simple API: what its parameters mean, and its paths on a real gateway."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gallama.api.request_bodies import parse_body
from gallama.api.server_sent_events import to_text_event
from gallama.api.simple import USUAL_MAX_TOKENS, WITHOUT_EFFECT, GenerateBody, GenerateParams, to_chat_request
from gallama.api.tokens import MAX_CHARACTERS
from gallama.conversation import ChatRequest
from gallama.errors import InvalidRequest
from gallama.generation import SamplingSettings

PROMPT = "What is the capital of paris"
# The examples of LLM-API's own documentation.
SEED = Path(__file__).parents[1] / "data" / "seed_llm_api"
LLAMA_PARAMS = json.loads((SEED / "llama.json").read_text())["params"]
HUGGINGFACE_PARAMS = json.loads((SEED / "huggingface.json").read_text())["params"]


def request_of(params: Any, *, streams: bool = False) -> ChatRequest:
    body = parse_body(json.dumps({"prompt": PROMPT, "params": params}).encode(), GenerateBody)
    return to_chat_request(body, request_id="r", model="m", streams=streams)


def texts_of(stream: str) -> list[str]:
    """The data of each event, as the standard says to read it."""
    texts = []
    for event in stream.split("\n\n"):
        lines = [line for line in event.split("\n") if line and not line.startswith(":")]
        if lines:
            assert all(line.startswith("data:") for line in lines)
            texts.append("\n".join(line.removeprefix("data:").removeprefix(" ") for line in lines))
    return texts


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory, serving_gateway: Any) -> Iterator[Any]:
    models = {
        "writer": {},
        "vectors": {"model_type": "embedding", "script": {"dimensions": 4}},
    }
    with serving_gateway(tmp_path_factory.mktemp("simple"), models, load=["writer"]) as started:
        started.wait_for("writer", states=["ready"])
        yield started


def post(gateway: Any, path: str, body: object) -> httpx.Response:
    with gateway.client() as client:
        answer: httpx.Response = client.post(path, json=body)
    return answer


def test_the_example_for_llama_has_its_meaning() -> None:
    request = request_of(LLAMA_PARAMS)
    assert request.prompt is not None
    assert (request.prompt.text, request.prompt.suffix, request.prompt.echo) == (PROMPT, None, False)
    assert (request.max_tokens, request.stop, request.logprobs) == (128, ("\\Q",), None)
    assert request.sampling == SamplingSettings(
        temperature=0.8,
        top_p=0.95,
        top_k=40,
        repetition_penalty=1.1,
        frequency_penalty=0.0,
        presence_penalty=0.0,
    )


def test_the_example_for_transformers_has_its_meaning() -> None:
    request = request_of(HUGGINGFACE_PARAMS)
    assert request.max_tokens == 25
    assert request.sampling == SamplingSettings(temperature=1.0, top_p=0.95, top_k=40)


@pytest.mark.parametrize("params", [None, {}])
def test_without_parameters_the_model_decides_but_for_the_length(params: Any) -> None:
    request = request_of(params)
    assert request.sampling == SamplingSettings()
    assert request.max_tokens == USUAL_MAX_TOKENS


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens", "n_predict"])
def test_a_limit_has_several_names(name: str) -> None:
    assert request_of({name: 7}).max_tokens == 7
    assert request_of({name: -1}).max_tokens is None


@pytest.mark.parametrize(
    ("params", "temperature"),
    [
        ({"temp": 0.2}, 0.2),
        ({"temp": 0.2, "temperature": 0.2}, 0.2),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 1.0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
    ],
)
def test_the_temperature_is_that_of_the_library(params: Any, temperature: float) -> None:
    assert request_of(params).sampling.temperature == temperature


def test_stop_words_come_together_from_all_their_names() -> None:
    assert request_of({"stop": "a", "stop_words": ["b"], "stop_strings": ["c", "a"]}).stop == ("a", "c", "b")
    assert request_of({"stop": []}).stop == ()


def test_any_seed_is_asked_for_in_the_way_of_llama_cpp() -> None:
    assert request_of({"seed": -1}).sampling.seed is None
    assert request_of({"seed": 4}).sampling.seed == 4


def test_constraints_of_our_own_hold_here_too() -> None:
    (constraint,) = request_of({"regex_pattern": "[0-9]+"}).constraints
    assert (constraint.kind, constraint.source) == ("regex", "[0-9]+")


def test_a_whole_config_of_transformers_defaults_is_taken() -> None:
    defaults = {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "temperature": 1.0,
        "typical_p": 1.0,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "early_stopping": False,
        "use_cache": True,
        "min_length": 0,
        "output_scores": False,
        "return_dict_in_generate": False,
        "guidance_scale": None,
        "pad_token_id": 2,
        "stream": False,
    }
    assert request_of(defaults).sampling == SamplingSettings(temperature=0.0)


@pytest.mark.parametrize(
    ("params", "param", "words"),
    [
        ({"min_length": 10}, "params.min_length", "regex_pattern"),
        ({"num_beams": 4}, "params.num_beams", "leave it out"),
        ({"use_cache": 1}, "params.use_cache", "leave it out"),
        ({"logprobs": 2}, "params.logprobs", "/v1/completions"),
        ({"n": 2}, "params.n", "/v1/completions"),
        ({"num_return_sequences": 2}, "params.num_return_sequences", "/v1/completions"),
        ({"explain": True}, "params.explain", "no place"),
        ({"stream": True}, "params.stream", "/agenerate"),
        ({"do_sample": False, "temp": 0.7}, "params.temperature", "`do_sample` is false"),
        ({"do_sample": True, "temperature": 0}, "params.temperature", "`do_sample` is true"),
        ({"max_tokens": 1, "n_predict": 2}, "params.max_tokens", "differ"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "params.repeat_penalty", "differ"),
        ({"max_length": 9, "suffix": "x"}, "params.max_length", "max_new_tokens"),
        ({"max_tokens": 0}, "params.max_tokens", "greater than or equal to 1"),
        ({"mirostat": 2}, "params.mirostat", "no such field"),
        ({"temperature": "hot"}, "params.temperature", "valid number"),
    ],
)
def test_what_cannot_be_honoured_is_named(params: Any, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        request_of(params)
    assert raised.value.param == param
    assert words in raised.value.message


def test_a_stream_may_say_that_it_is_one() -> None:
    assert request_of({"stream": True}, streams=True).max_tokens == USUAL_MAX_TOKENS
    with pytest.raises(InvalidRequest, match="/generate answers with the whole text"):
        request_of({"stream": False}, streams=True)


def test_the_document_names_every_parameter_that_has_a_meaning() -> None:
    document = (Path(__file__).parents[2] / "docs" / "simple_api.md").read_text()
    changes_nothing = {*WITHOUT_EFFECT, "model", "pad_token_id", "stream", "user"}
    missing = [
        name for name in GenerateParams.model_fields.keys() - changes_nothing if f"`{name}`" not in document
    ]
    assert missing == []
    assert f"Default: {USUAL_MAX_TOKENS} |" in document


def test_any_text_goes_through_an_event_as_it_is() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(
            rng.choices(["a", " ", "\n", ":", "data: ", "é", "\x85", "\u2028"], k=rng.randint(1, 9))
        )
        assert texts_of(to_text_event(text).decode()) == [text]
    assert texts_of(to_text_event("a\r\nb\rc").decode()) == ["a\nb\nc"]


def test_an_answer_is_a_json_string_and_no_model_is_named(simple: Any) -> None:
    answer = post(simple, "/generate", {"prompt": PROMPT, "params": {"max_tokens": 10}})
    assert answer.status_code == 200, answer.text
    assert answer.json() == PROMPT[:10]


def test_an_answer_comes_in_pieces_that_make_the_same_text(simple: Any) -> None:
    prompt = "One line,\n  and another: ünd\n\n"
    answer = post(simple, "/agenerate", {"prompt": prompt})
    assert answer.headers["content-type"].startswith("text/event-stream")
    pieces = texts_of(answer.text)
    assert len(pieces) > 10
    assert "".join(pieces) == post(simple, "/generate", {"prompt": prompt}).json() == prompt


def test_an_answer_begins_with_its_prompt_where_that_is_asked_for(simple: Any) -> None:
    answer = post(simple, "/generate", {"prompt": "abc", "params": {"echo": True, "stop": "c"}})
    assert answer.json() == "abcab"


def test_a_length_counts_the_prompt_too(simple: Any) -> None:
    def length(params: Any) -> int:
        return len(post(simple, "/generate", {"prompt": "0123456789", "params": params}).json())

    assert length({"max_length": 13}) == 3
    assert length({"max_length": 13, "max_new_tokens": 5}) == 5


def test_a_length_that_leaves_nothing_is_refused(simple: Any) -> None:
    answer = post(simple, "/generate", {"prompt": "0123456789", "params": {"max_length": 10}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "params.max_length")
    assert "10 tokens" in answer.json()["error"]["message"]


def test_a_length_does_not_make_us_count_the_tokens_of_a_huge_prompt(simple: Any) -> None:
    body = {"prompt": "a" * (MAX_CHARACTERS + 1), "params": {"max_length": 10}}
    answer = post(simple, "/generate", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "params.max_length")
    assert "max_new_tokens" in answer.json()["error"]["message"]


def test_a_constrained_answer_carries_its_guarantee(simple: Any) -> None:
    body = {"prompt": "the year ", "params": {"regex_pattern": "19[0-9]{2}"}}
    answer = post(simple, "/generate", body)
    assert answer.json()[:2] == "19"
    assert len(answer.json()) == 4
    assert json.loads(answer.headers["x-gallama-guarantee"])["complete"] is True


def test_a_refused_stream_is_a_status(simple: Any) -> None:
    answer = post(simple, "/agenerate", {"prompt": "a", "params": {"regex_pattern": "(["}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "params.regex_pattern")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate", {"prompt": "a", "params": {"regex_pattern": "(["}}, "params.regex_pattern"),
        ("/generate", {"prompt": "a", "params": {"stop": [str(n) for n in range(99)]}}, "params.stop"),
        ("/generate", {"prompt": "a", "params": {"suffix": "b"}}, "params.suffix"),
        ("/generate", {"prompt": "a" * 10_000}, "prompt"),
        ("/generate", {"prompt": "a", "model": "vectors"}, "model"),
        ("/generate", {"prompt": "a", "temperature": 0}, "temperature"),
        ("/embeddings", {"text": "a" * 10_000}, "text"),
    ],
)
def test_an_error_names_the_place_that_the_value_was_sent_in(
    simple: Any, path: str, body: Any, param: str
) -> None:
    answer = post(simple, path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert "input" not in answer.json()["error"]["message"]


def test_a_vector_is_a_list_of_numbers(simple: Any) -> None:
    answer = post(simple, "/embeddings", {"text": PROMPT})
    assert answer.status_code == 200, answer.text
    same = post(simple, "/v1/embeddings", {"input": PROMPT, "model": "vectors"}).json()["data"][0][
        "embedding"
    ]
    assert answer.json() == same
    assert len(struct.pack("4f", *answer.json())) == 16


def test_a_model_may_be_named_beside_or_among_the_parameters(simple: Any) -> None:
    for body in ({"prompt": "a", "model": "writer"}, {"prompt": "a", "params": {"model": "writer"}}):
        assert post(simple, "/generate", body).json() == "a"
    answer = post(simple, "/generate", {"prompt": "a", "model": "writer", "params": {"model": "vectors"}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "params.model")
    answer = post(simple, "/generate", {"prompt": "a", "model": "vectors"})
    assert answer.status_code == 400
    assert "vectors" in answer.json()["error"]["message"]


def test_of_several_models_one_must_be_named(gateway: Any) -> None:
    for path, body in (("/generate", {"prompt": "x"}), ("/embeddings", {"text": "x"})):
        answer = post(gateway, path, body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
        assert "name one in `model`" in answer.json()["error"]["message"]


def test_a_check_is_passed_once_the_models_can_answer(start_gateway: Any) -> None:
    gateway = start_gateway({"late": {"script": {"seconds_to_load": 1}}}, wait=False)
    with gateway.client() as client:
        early = client.get("/check")
        assert (early.status_code, early.json()["error"]["code"]) == (503, "model_unavailable")
        gateway.wait_for("late", states=["ready"])
        assert client.get("/check").json() == "Ok"


def test_a_stream_that_breaks_ends_in_an_error(gateway: Any) -> None:
    seen: list[bytes] = []
    with (
        gateway.client() as client,
        client.stream("POST", "/agenerate", json={"prompt": "x", "model": "broken"}) as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        seen.extend(answer.iter_raw())
    *pieces, error = texts_of(b"".join(seen).decode())
    assert "".join(pieces) == "abc"
    assert json.loads(error)["error"]["type"] == "server_error"
