"""Requests for vectors and rankings, with one model that makes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import numpy as np
from numpy.typing import NDArray

from gallama.conversation import ChatEvent, ChatRequest
from gallama.embedding import Embedder, Embeddings, EmbedRequest, Relevances, RerankRequest
from gallama.errors import EngineFailed, InvalidRequest, NotSupported, UnsupportedValue
from gallama.tokenization import DetokenizedText, DetokenizeRequest, TokenizedText, TokenizeRequest
from gallama.wire import UnaryReply, UnaryRequest


class EmbedRunner:
    """Answers requests with one embedder."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    async def run(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """
        Raises:
            NotSupported: always.
        """
        raise NotSupported(f"{request.model} makes no text: it embeds.")
        yield

    async def reply(self, request: UnaryRequest) -> UnaryReply:
        """
        Raises:
            GallamaError: the request is refused, or failed.
        """
        match request:
            case EmbedRequest():
                return await self._embed(request)
            case RerankRequest():
                ranked = await self._embedder.rerank(request.query, request.documents)
                _check_finite(ranked.scores)
                return Relevances(scores=tuple(ranked.scores), prompt_tokens=ranked.tokens)
            case TokenizeRequest():
                return await asyncio.to_thread(self._tokenize, request)
            case DetokenizeRequest():
                return await asyncio.to_thread(self._detokenize, request)

    async def _embed(self, request: EmbedRequest) -> Embeddings:
        self._check_dimensions(request.dimensions)
        embedded = await self._embedder.embed(request.inputs)
        _check_finite(embedded.vectors)
        vectors = _cut(embedded.vectors, request.dimensions).astype("<f4", copy=False)
        return Embeddings(vectors=tuple(row.tobytes() for row in vectors), prompt_tokens=embedded.tokens)

    def _check_dimensions(self, dimensions: int | None) -> None:
        """
        Raises:
            UnsupportedValue: the model's vectors cannot be cut to so many.
        """
        own, shorter = self._embedder.dimensions, self._embedder.shorter_dimensions
        if dimensions is None or dimensions == own:
            return
        if dimensions < own if shorter == "any" else dimensions in shorter:
            return
        others = "all smaller numbers" if shorter == "any" else ", ".join(map(str, shorter)) or "no others"
        raise UnsupportedValue(
            f"The model's vectors have {own} dimensions; it allows {others}, not {dimensions}.",
            param="dimensions",
        )

    def _tokenize(self, request: TokenizeRequest) -> TokenizedText:
        if request.chat is not None:
            raise InvalidRequest("The model takes no messages; send its text as `prompt`.", param="messages")
        special = request.add_special_tokens
        token_ids = self._embedder.tokenize(request.text, add_special_tokens=special)
        texts = self._embedder.token_texts(token_ids)
        return TokenizedText(
            token_ids=tuple(token_ids),
            token_texts=tuple(text.decode(errors="replace") for text in texts),
            context_length=self._embedder.context_length,
        )

    def _detokenize(self, request: DetokenizeRequest) -> DetokenizedText:
        texts = self._embedder.token_texts(request.token_ids)
        return DetokenizedText(text=b"".join(texts).decode(errors="replace"))


def _check_finite(numbers: NDArray[np.float32] | Sequence[float]) -> None:
    """
    Raises:
        EngineFailed: what the model has computed is no number; JSON has no other.
    """
    if not np.isfinite(numbers).all():
        raise EngineFailed("The model's computation overflowed. Load it with more precise numbers (dtype).")


def _cut(vectors: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first dimensions of each vector, made as long as 1 again.

    Args:
        vectors: shape (texts, dimensions).
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    lengths: NDArray[np.float32] = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.divide(cut, np.maximum(lengths, np.finfo(np.float32).tiny))
