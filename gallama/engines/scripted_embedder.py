"""An embedder without a model, for tests of everything around one: a text's vector is made of its hash.

One token is one byte. What it does, and what goes wrong, stands in the spec's `backend_extra_args`, as for
the engine of `scripted`:

    -id "model_id=any model_type=embedding backend=scripted backend_extra_args.dimensions=384"
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gallama.config import ModelSpec
from gallama.embedding import EmbeddedTexts, RankedTexts
from gallama.engines import ignore_progress
from gallama.engines.scripted import LoadScript, Seconds, TokenCount, play_loading
from gallama.errors import InvalidRequest, TextTooLong, UnsupportedValue
from gallama.generation import EngineStatus, ReportProgress

_BEGIN, _END = 256, 257
_SPECIAL_TOKENS = (b"[CLS]", b"[SEP]")
_SPECIAL_TOKENS_PER_TEXT = 2
_VOCABULARY_SIZE = 258

TextCount = Annotated[int, Field(ge=0)]


class EmbeddingScript(LoadScript):
    """What the embedder does. "After" counts the texts that the process was given; None: never."""

    dimensions: Annotated[int, Field(ge=1)] = 8
    shorter_dimensions: Literal["any"] | tuple[TokenCount, ...] = ()
    ranks: bool = False
    """Whether it ranks, by the words that query and document share, instead of making vectors."""
    texts_per_pass: Annotated[int, Field(ge=1)] = 32
    """That share one forward pass, of however many requests they are."""
    seconds_per_pass: Seconds = 0
    die_after_texts: TextCount | None = None
    """The process ends without a word."""
    raise_after_texts: TextCount | None = None
    hang_after_texts: TextCount | None = None
    """That call never ends, others go on."""
    freeze_after_texts: TextCount | None = None
    """The whole process stops to answer."""


def load(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> ScriptedEmbedder:
    """Make the embedder that the spec describes; `path` may be anything.

    Raises:
        InvalidConfig: the arguments are unknown or wrong.
        ModelLoadFailed: the script says so.
    """
    script = play_loading(EmbeddingScript, spec, report_progress)
    return ScriptedEmbedder(script, context_length=spec.max_seq_len or 512)


class ScriptedEmbedder:
    """Makes vectors that differ with their texts, and mean nothing."""

    def __init__(self, script: EmbeddingScript, *, context_length: int) -> None:
        self.context_length = context_length
        self.dimensions = 0 if script.ranks else script.dimensions
        self.shorter_dimensions = script.shorter_dimensions
        self._script = script
        self._waiting: deque[asyncio.Future[None]] = deque()
        """One for each text that no forward pass has taken yet."""
        self._passes: asyncio.Task[None] | None = None
        self._texts = 0
        self._busy = 0
        self._steps = 0

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        token_ids = list(text.encode())
        return [_BEGIN, *token_ids, _END] if add_special_tokens else token_ids

    def token_texts(self, token_ids: Sequence[int]) -> list[bytes]:
        _check_tokens(token_ids, param="tokens")
        return [
            bytes([token_id]) if token_id < _BEGIN else _SPECIAL_TOKENS[token_id - _BEGIN]
            for token_id in token_ids
        ]

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> EmbeddedTexts:
        if self._script.ranks:
            raise UnsupportedValue("The model only ranks: ask it at /v1/rerank.", param="model")
        texts = [
            self.tokenize(text, add_special_tokens=True) if isinstance(text, str) else text for text in inputs
        ]
        for token_ids in texts:
            if not token_ids:
                raise InvalidRequest("A text has no tokens; send one that has some.", param="input")
            _check_tokens(token_ids, param="input")
            self._check_length(len(token_ids), param="input")
        await self._compute(len(texts))
        return EmbeddedTexts(
            vectors=np.stack([_vector(token_ids, self.dimensions) for token_ids in texts]),
            tokens=sum(map(len, texts)),
        )

    async def rerank(self, query: str, documents: Sequence[str]) -> RankedTexts:
        if not self._script.ranks:
            raise UnsupportedValue("The model does not rank: it makes vectors of texts.", param="model")
        tokens = [
            len(query.encode()) + len(document.encode()) + _SPECIAL_TOKENS_PER_TEXT for document in documents
        ]
        self._check_length(max(tokens), param="documents")
        await self._compute(len(documents))
        words = set(query.split())
        shares = [len(words & set(document.split())) / max(len(words), 1) for document in documents]
        return RankedTexts(scores=shares, tokens=sum(tokens))

    def status(self) -> EngineStatus:
        return EngineStatus(
            busy_slots=self._busy, waiting=len(self._waiting), cached_tokens=0, steps=self._steps
        )

    async def probe(self) -> None:
        await self._compute(1)

    async def close(self) -> None:
        if self._passes is not None:
            self._passes.cancel()
            await asyncio.gather(self._passes, return_exceptions=True)

    def _check_length(self, tokens: int, *, param: str) -> None:
        if tokens > self.context_length:
            raise TextTooLong(
                f"A text has {tokens} tokens; the model reads {self.context_length}.", param=param
            )

    async def _compute(self, texts: int) -> None:
        """Wait until as many texts have gone through the model, together with those of others."""
        self._busy += 1
        try:
            await self._misbehave(texts)
            computed = [asyncio.get_running_loop().create_future() for _ in range(texts)]
            self._waiting.extend(computed)
            if self._passes is None or self._passes.done():
                self._passes = asyncio.create_task(self._run_passes())
            await asyncio.gather(*computed)
        finally:
            self._busy -= 1

    async def _run_passes(self) -> None:
        await asyncio.sleep(0)  # what came in the same moment goes along
        while batch := self._next_batch():
            await asyncio.sleep(self._script.seconds_per_pass)
            self._steps += 1
            for computed in batch:
                with contextlib.suppress(asyncio.InvalidStateError):  # its client may have left
                    computed.set_result(None)

    def _next_batch(self) -> list[asyncio.Future[None]]:
        batch: list[asyncio.Future[None]] = []
        while self._waiting and len(batch) < self._script.texts_per_pass:
            computed = self._waiting.popleft()
            if not computed.cancelled():
                batch.append(computed)
        return batch

    async def _misbehave(self, texts: int) -> None:
        script = self._script
        before, self._texts = self._texts, self._texts + texts

        def has_come(count: int | None) -> bool:
            return count is not None and before + texts > count

        if has_come(script.die_after_texts):
            os._exit(3)
        if has_come(script.raise_after_texts):
            raise RuntimeError(f"The script says to fail after {script.raise_after_texts} texts.")
        if has_come(script.hang_after_texts):
            await asyncio.Event().wait()
        if has_come(script.freeze_after_texts):
            time.sleep(3600)  # noqa: ASYNC251  freezing the event loop is the point


def _check_tokens(token_ids: Sequence[int], *, param: str) -> None:
    """
    Raises:
        InvalidRequest: there is no such token.
    """
    unknown = next((token_id for token_id in token_ids if not 0 <= token_id < _VOCABULARY_SIZE), None)
    if unknown is not None:
        raise InvalidRequest(
            f"There is no token {unknown}; the last one is {_VOCABULARY_SIZE - 1}.", param=param
        )


def _vector(token_ids: Sequence[int], dimensions: int) -> NDArray[np.float32]:
    """Always the same for the same tokens; of length 1."""
    text = b"".join(token_id.to_bytes(2, "little") for token_id in token_ids)
    seed = int.from_bytes(hashlib.sha256(text).digest(), "little")
    vector = np.random.default_rng(seed).standard_normal(dimensions)
    unit: NDArray[np.float32] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit
