"""Requests for vectors and rankings, with an embedder whose vectors are known."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest

from gallama.conversation import ChatRequest, Message
from gallama.embedding import (
    EmbeddedTexts,
    Embeddings,
    EmbedRequest,
    RankedTexts,
    Relevances,
    RerankRequest,
)
from gallama.errors import EngineFailed, InvalidRequest, NotSupported, UnsupportedValue
from gallama.generation import EngineStatus
from gallama.tokenization import DetokenizedText, DetokenizeRequest, TokenizedText, TokenizeRequest
from gallama.worker.embed import EmbedRunner

VECTOR = np.array([0.6, 0.0, 0.8, 0.0], dtype=np.float32)


class FourDimensions:
    """Gives every text the same vector."""

    context_length = 16
    dimensions = 4

    def __init__(self, shorter: Literal["any"] | tuple[int, ...] = ()) -> None:
        self.shorter_dimensions = shorter

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0] * add_special_tokens + list(text.encode())

    def token_texts(self, token_ids: Sequence[int]) -> list[bytes]:
        return [bytes([token_id]) if token_id else b"" for token_id in token_ids]

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> EmbeddedTexts:
        return EmbeddedTexts(vectors=np.stack([VECTOR] * len(inputs)), tokens=3 * len(inputs))

    async def rerank(self, query: str, documents: Sequence[str]) -> RankedTexts:
        return RankedTexts(scores=[float(query == document) for document in documents], tokens=9)

    def status(self) -> EngineStatus:
        return EngineStatus(busy_slots=0, waiting=0, cached_tokens=0)

    async def probe(self) -> None:
        pass

    async def close(self) -> None:
        pass


async def vector_of(
    shorter: Literal["any"] | tuple[int, ...] = (), dimensions: int | None = None
) -> list[float]:
    runner = EmbedRunner(FourDimensions(shorter))
    request = EmbedRequest(request_id="r", model="m", inputs=("hi", (1, 2)), dimensions=dimensions)
    reply = await runner.reply(request)
    assert isinstance(reply, Embeddings)
    assert reply.prompt_tokens == 6
    first, second = reply.vectors
    assert first == second
    return [float(value) for value in np.frombuffer(first, dtype="<f4")]


@pytest.mark.parametrize("dimensions", [None, 4])
async def test_vectors_are_little_endian_floats_of_all_dimensions(dimensions: int | None) -> None:
    assert await vector_of(dimensions=dimensions) == pytest.approx([0.6, 0, 0.8, 0])


@pytest.mark.parametrize("shorter", ["any", (2, 3)])
async def test_a_vector_that_is_cut_has_length_one_again(shorter: Literal["any"] | tuple[int, ...]) -> None:
    assert await vector_of(shorter, dimensions=3) == pytest.approx([0.6, 0, 0.8])
    assert await vector_of(shorter, dimensions=2) == pytest.approx([1, 0])


@pytest.mark.parametrize(
    ("shorter", "dimensions", "allowed"),
    [((), 2, "no others"), ((2,), 3, "allows 2,"), ("any", 5, "all smaller numbers"), ((8,), 5, "allows 8,")],
)
async def test_other_dimensions_are_refused(
    shorter: Literal["any"] | tuple[int, ...], dimensions: int, allowed: str
) -> None:
    with pytest.raises(UnsupportedValue, match=allowed) as error:
        await vector_of(shorter, dimensions)
    assert error.value.param == "dimensions"


async def test_documents_are_ranked() -> None:
    request = RerankRequest(request_id="r", model="m", query="a", documents=("b", "a"))
    reply = await EmbedRunner(FourDimensions()).reply(request)
    assert reply == Relevances(scores=(0.0, 1.0), prompt_tokens=9)


@pytest.mark.parametrize(
    "request_",
    [
        EmbedRequest(request_id="r", model="m", inputs=("hi",)),
        RerankRequest(request_id="r", model="m", query="hi", documents=("a",)),
    ],
)
async def test_what_is_no_number_is_no_answer(request_: EmbedRequest | RerankRequest) -> None:
    class Overflowing(FourDimensions):
        async def embed(self, inputs: Sequence[str | Sequence[int]]) -> EmbeddedTexts:
            return EmbeddedTexts(vectors=np.array([[np.nan, 0, 0, 1]], dtype=np.float32), tokens=1)

        async def rerank(self, query: str, documents: Sequence[str]) -> RankedTexts:
            return RankedTexts(scores=[float("inf")], tokens=1)

    with pytest.raises(EngineFailed):
        await EmbedRunner(Overflowing()).reply(request_)


async def test_tokens_are_told_and_read() -> None:
    runner = EmbedRunner(FourDimensions())
    tokenized = await runner.reply(TokenizeRequest(request_id="r", model="m", text="hé"))
    assert tokenized == TokenizedText(
        token_ids=(0, 104, 0xC3, 0xA9), token_texts=("", "h", "\ufffd", "\ufffd"), context_length=16
    )
    detokenized = await runner.reply(
        DetokenizeRequest(request_id="r", model="m", token_ids=(104, 0xC3, 0xA9))
    )
    assert detokenized == DetokenizedText(text="hé")


async def test_others_go_on_while_a_million_tokens_become_a_text() -> None:
    class Long(FourDimensions):
        def __init__(self) -> None:
            super().__init__()
            self.others_went_on = threading.Event()

        def token_texts(self, token_ids: Sequence[int]) -> list[bytes]:
            return [b"yes" if self.others_went_on.wait(5) else b"no"]

    embedder = Long()
    request = DetokenizeRequest(request_id="r", model="m", token_ids=(1,))
    reading = asyncio.create_task(EmbedRunner(embedder).reply(request))
    asyncio.get_running_loop().call_later(0.05, embedder.others_went_on.set)
    assert await reading == DetokenizedText(text="yes")


async def test_messages_are_refused() -> None:
    chat = ChatRequest(request_id="r", model="m", messages=(Message(role="user", content="hi"),))
    runner = EmbedRunner(FourDimensions())
    with pytest.raises(InvalidRequest) as error:
        await runner.reply(TokenizeRequest(request_id="r", model="m", chat=chat))
    assert error.value.param == "messages"
    with pytest.raises(NotSupported):
        await anext(runner.run(chat))
