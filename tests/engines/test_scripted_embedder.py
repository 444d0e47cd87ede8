from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from gallama.config import ModelSpec
from gallama.engines import EMBEDDERS, scripted_embedder
from gallama.engines.scripted_embedder import ScriptedEmbedder
from gallama.errors import InvalidConfig, InvalidRequest, ModelLoadFailed, TextTooLong, UnsupportedValue


def spec(**arguments: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "model_id": "any",
            "model_type": "embedding",
            "backend": "scripted",
            "max_seq_len": 64,
            "backend_extra_args": arguments,
        }
    )


def make(**arguments: object) -> ScriptedEmbedder:
    return scripted_embedder.load(spec(**arguments), Path("nowhere"))


async def test_equal_texts_have_equal_vectors_of_length_1_and_others_have_others() -> None:
    embedder = EMBEDDERS["scripted"](spec(dimensions=32), Path("nowhere"))
    embedded = await embedder.embed(["one", "two", "one", embedder.tokenize("two", add_special_tokens=True)])
    first, second, third, fourth = embedded.vectors
    assert embedded.vectors.shape == (4, 32)
    assert embedded.tokens == 20
    assert np.linalg.norm(embedded.vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    assert np.array_equal(first, third)
    assert np.array_equal(second, fourth)
    assert not np.allclose(first, second, atol=0.1)


async def test_texts_that_come_together_share_forward_passes() -> None:
    embedder = make(texts_per_pass=4)
    await asyncio.gather(*(embedder.embed([str(number)]) for number in range(10)))
    assert embedder.status().steps == 3
    assert embedder.status().busy_slots == 0


async def test_who_leaves_takes_no_place_in_a_pass() -> None:
    embedder = make(texts_per_pass=1, seconds_per_pass=0.02)
    calls = [asyncio.create_task(embedder.embed([str(number)])) for number in range(10)]
    await asyncio.sleep(0.01)
    for call in calls[1:]:
        call.cancel()
    await calls[0]
    await embedder.probe()
    assert embedder.status().steps == 2
    assert embedder.status().busy_slots == 0


async def test_one_that_ranks_counts_shared_words_and_makes_no_vectors() -> None:
    ranker = make(ranks=True)
    ranked = await ranker.rerank("a b", ["b", "c", "b a"])
    assert list(ranked.scores) == [0.5, 0.0, 1.0]
    assert ranked.tokens == 3 * 5 + 5
    with pytest.raises(UnsupportedValue):
        await ranker.embed(["a"])
    with pytest.raises(UnsupportedValue):
        await make().rerank("a", ["b"])


async def test_what_is_too_long_or_no_token_is_refused() -> None:
    embedder = make()
    assert (await embedder.embed(["x" * 62])).tokens == 64
    with pytest.raises(TextTooLong):
        await embedder.embed(["a", "x" * 63])
    with pytest.raises(InvalidRequest, match="258"):
        await embedder.embed([[258]])
    with pytest.raises(InvalidRequest, match="-1"):
        embedder.token_texts([-1])


def test_tokens_make_their_text_again() -> None:
    embedder = make()
    token_ids = embedder.tokenize("ä", add_special_tokens=True)
    assert embedder.token_texts(token_ids) == [b"[CLS]", b"\xc3", b"\xa4", b"[SEP]"]


async def test_it_fails_or_hangs_when_the_script_says_so() -> None:
    failing = make(raise_after_texts=2)
    await failing.embed(["a", "b"])
    with pytest.raises(RuntimeError, match="after 2 texts"):
        await failing.embed(["c"])
    hanging = make(hang_after_texts=0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(hanging.embed(["a"]), 0.01)
    assert (failing.status().busy_slots, hanging.status().busy_slots) == (0, 0)


def test_unknown_arguments_are_refused_and_loading_may_fail() -> None:
    with pytest.raises(InvalidConfig, match=r"backend_extra_args\.reply"):
        make(reply="a")
    with pytest.raises(ModelLoadFailed, match="no memory"):
        make(fail_at_load="no memory")
