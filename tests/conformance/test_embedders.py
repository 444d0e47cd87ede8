"""What every embedder owes its callers. A new one is one more row of the table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from gallama.config import ModelSpec
from gallama.embedding import Embedder
from gallama.engines import EMBEDDERS
from gallama.errors import InvalidRequest, TextTooLong, UnsupportedValue
from tests.engines.gguf_of_bert import write_gguf_of_bert

TEXTS = ["A cat sits on the mat.", "Shares fell at noon.", "Grüße, 世界! 😀", "a", "x " * 100]
# One text in other company may be rounded in another way.
TOLERANCE = 1e-3

# An embedder lives in one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


def _scripted(_: Path, _minilm_folder: Path) -> Embedder:
    slow = {"dimensions": 16, "seconds_per_pass": 0.005, "texts_per_pass": 8}
    spec = ModelSpec(
        model_id="any", model_type="embedding", backend="scripted", backend_extra_args=slow, max_seq_len=512
    )
    return EMBEDDERS["scripted"](spec, Path("any"))


def _llama_cpp(folder: Path, minilm_folder: Path) -> Embedder:
    file = write_gguf_of_bert(minilm_folder, folder / "minilm.gguf")
    spec = ModelSpec(model_id=str(file), model_type="embedding", backend="llama_cpp")
    embedder = EMBEDDERS["llama_cpp"](spec, file)
    file.unlink()  # it stays readable for who has mapped it
    return embedder


MAKERS: dict[str, Callable[[Path, Path], Embedder]] = {"scripted": _scripted, "llama_cpp": _llama_cpp}


@pytest_asyncio.fixture(params=list(MAKERS), scope="module", loop_scope="module")
async def embedder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path
) -> AsyncIterator[Embedder]:
    embedder = MAKERS[request.param](tmp_path_factory.mktemp("model"), minilm_folder)
    yield embedder
    await embedder.close()


async def vectors_of(embedder: Embedder, *inputs: str | Sequence[int]) -> NDArray[np.float32]:
    return (await embedder.embed(inputs)).vectors


async def test_vectors_are_as_long_as_1(embedder: Embedder) -> None:
    vectors = await vectors_of(embedder, *TEXTS)
    assert vectors.shape == (len(TEXTS), embedder.dimensions)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


async def test_vectors_come_in_the_order_of_the_texts(embedder: Embedder) -> None:
    forwards, backwards = await vectors_of(embedder, *TEXTS), await vectors_of(embedder, *reversed(TEXTS))
    np.testing.assert_allclose(forwards, backwards[::-1], atol=TOLERANCE)
    assert np.linalg.matrix_rank(forwards, tol=0.01) == len(TEXTS)


async def test_token_ids_stand_for_their_text(embedder: Embedder) -> None:
    token_ids = [embedder.tokenize(text, add_special_tokens=True) for text in TEXTS]
    embedded = await embedder.embed(token_ids)
    np.testing.assert_allclose(embedded.vectors, await vectors_of(embedder, *TEXTS), atol=TOLERANCE)
    assert embedded.tokens == sum(map(len, token_ids))


async def test_calls_at_the_same_time_share_forward_passes(embedder: Embedder) -> None:
    before = embedder.status().steps
    await asyncio.gather(*(vectors_of(embedder, f"Number {number}") for number in range(32)))
    assert 0 < embedder.status().steps - before <= 16


async def test_a_cancelled_call_leaves_the_others_and_frees_its_place(embedder: Embedder) -> None:
    expected = await vectors_of(embedder, *TEXTS)
    cancelled = asyncio.create_task(embedder.embed(TEXTS * 200))
    others = [asyncio.create_task(vectors_of(embedder, *TEXTS)) for _ in range(4)]
    await asyncio.sleep(0.05)
    cancelled.cancel()
    for vectors in await asyncio.gather(*others):
        np.testing.assert_allclose(vectors, expected, atol=TOLERANCE)
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await vectors_of(embedder, "after the step at hand")
    assert embedder.status().busy_slots == 0


async def test_a_text_of_the_greatest_length_is_taken_and_a_longer_one_refused(embedder: Embedder) -> None:
    (token_id,) = embedder.tokenize("a", add_special_tokens=False)
    longest = [token_id] * embedder.context_length
    assert (await embedder.embed([longest])).tokens == embedder.context_length
    with pytest.raises(TextTooLong, match=str(embedder.context_length + 1)) as raised:
        await embedder.embed(["short", [*longest, token_id]])
    assert raised.value.param == "input"


@pytest.mark.parametrize("token_ids", [[], [-1], [10**6], [2**40]])
async def test_token_ids_that_there_are_not_are_refused(embedder: Embedder, token_ids: list[int]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await embedder.embed(["fine", token_ids])
    assert raised.value.param == "input"


async def test_texts_of_tokens_make_up_the_text(embedder: Embedder) -> None:
    token_ids = embedder.tokenize("a nice text", add_special_tokens=False)
    assert b"".join(embedder.token_texts(token_ids)).strip() == b"a nice text"
    framed = embedder.tokenize("a nice text", add_special_tokens=True)
    assert framed[1:-1] == token_ids
    assert all(embedder.token_texts(framed))


async def test_a_probe_computes(embedder: Embedder) -> None:
    before = embedder.status().steps
    await embedder.probe()
    assert embedder.status().steps > before


async def test_a_model_that_embeds_does_not_rank(embedder: Embedder) -> None:
    with pytest.raises(UnsupportedValue):
        await embedder.rerank("query", ["document"])
