"""An engine without a model, for tests of everything around an engine: it plays a text, byte by byte.

One token is one byte. What it does, and what goes wrong, stands in the spec's `backend_extra_args`:

    -id "model_id=any backend=scripted backend_extra_args.reply=hi backend_extra_args.slots=2"
"""

from __future__ import annotations

import asyncio
import codecs
import os
import re
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from gallama.config import ModelSpec
from gallama.engines import ignore_progress
from gallama.engines.extra_arguments import read_extra_arguments
from gallama.errors import ConstraintFailed, ModelLoadFailed
from gallama.generation import (
    EndReason,
    EngineStatus,
    GeneratedChunk,
    GenerationRequest,
    ReportProgress,
    SamplingSettings,
    State,
    TokenLogprob,
    Vocabulary,
)

_CONTROL_TOKENS = {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258}
_START, _END = 256, 257
_VOCABULARY_SIZE = 259
_HUNDRED = 100
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Where the script's byte is not allowed, what closes things goes first: an answer then ends soon.
_PREFERRED_BYTES = b'"}]'

S = TypeVar("S", bound="LoadScript")
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TokenCount = Annotated[int, Field(ge=0)]


class LoadScript(BaseModel):
    """How loading goes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds_to_load: Seconds = 0
    fail_at_load: str | None = None
    """The reason to fail with."""
    die_at_load: bool = False


class Script(LoadScript):
    """What the engine does. "After" counts the tokens of one answer; None: never."""

    reply: str | None = None
    """None: the last user's text."""
    slots: Annotated[int, Field(ge=1)] | None = None
    """Answers at the same time. None: the spec's `max_concurrent_requests`."""
    seconds_before_first_token: Seconds = 0
    seconds_per_token: Seconds = 0
    die_after_tokens: TokenCount | None = None
    """The process ends without a word."""
    raise_after_tokens: TokenCount | None = None
    hang_after_tokens: TokenCount | None = None
    """This answer never ends, others go on."""
    freeze_after_tokens: TokenCount | None = None
    """The whole process stops to answer."""


def load(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> ScriptedEngine:
    """Make the engine that the spec describes; `path` may be anything.

    Raises:
        InvalidConfig: the arguments are unknown or wrong.
        ModelLoadFailed: the script says so.
    """
    script = play_loading(Script, spec, report_progress)
    return ScriptedEngine(
        script, slots=script.slots or spec.max_concurrent_requests, context_length=spec.max_seq_len or 4096
    )


def play_loading(script_type: type[S], spec: ModelSpec, report_progress: ReportProgress) -> S:
    """The spec's script, once its loading is played.

    Raises:
        InvalidConfig: the arguments are unknown or wrong.
        ModelLoadFailed: the script says so.
    """
    script = read_extra_arguments(script_type, spec, backend="scripted")
    for percent in range(_HUNDRED):
        report_progress(percent / _HUNDRED)
        time.sleep(script.seconds_to_load / _HUNDRED)
    if script.die_at_load:
        os._exit(3)
    if script.fail_at_load is not None:
        raise ModelLoadFailed(script.fail_at_load)
    return script


class ScriptedEngine:
    """Plays a text, and obeys a grammar where there is one."""

    def __init__(self, script: Script, *, slots: int, context_length: int) -> None:
        self.context_length = context_length
        self.chat_template = _CHAT_TEMPLATE
        self.vocabulary = Vocabulary(
            tokens=(*(bytes([byte]) for byte in range(256)), b"", b"", b""),
            control_tokens=_CONTROL_TOKENS,
            end_token_ids=frozenset({_END, _CONTROL_TOKENS["<|endoftext|>"]}),
            end_token_id=_END,
            start_token_id=None,
            encode=list,
            fingerprint="scripted-bytes",
        )
        self._script = script
        self._free_slots = asyncio.Semaphore(slots)
        self._busy = 0
        self._waiting = 0
        self._steps = 0
        self._sampled_tokens = 0

    def tokenize(self, text: str) -> list[int]:
        return [token_id for piece in _split_at_control_tokens(text) for token_id in _piece_token_ids(piece)]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
        self._waiting += 1
        try:
            await self._free_slots.acquire()
        finally:
            self._waiting -= 1
        self._busy += 1
        try:
            async with aclosing(self._play(request)) as chunks:
                async for chunk in chunks:
                    self._steps += 1
                    self._sampled_tokens += chunk.sampled_tokens
                    yield chunk
        finally:
            self._busy -= 1
            self._free_slots.release()

    def status(self) -> EngineStatus:
        return EngineStatus(
            busy_slots=self._busy,
            waiting=self._waiting,
            cached_tokens=0,
            steps=self._steps,
            sampled_tokens=self._sampled_tokens,
        )

    async def probe(self) -> None:
        request = GenerationRequest(prompt_token_ids=[_START], max_tokens=1, sampling=SamplingSettings())
        async with aclosing(self.generate(request)) as chunks:
            async for _ in chunks:
                pass

    async def close(self) -> None:
        pass

    async def _play(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
        await asyncio.sleep(self._script.seconds_before_first_token)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        reason: EndReason = "length"
        count = 0
        if request.prompt_logprobs:
            yield GeneratedChunk(prompt_logprobs=_prompt_logprobs(request))
        for token_id in self._choose_tokens(request):
            if token_id in self.vocabulary.end_token_ids:
                reason = "stop"
                break
            if count == request.max_tokens:
                break
            await self._misbehave(count)
            await asyncio.sleep(self._script.seconds_per_token)
            count += 1
            yield self._to_chunk(token_id, decoder, request)
        await self._misbehave(count)
        yield GeneratedChunk(text=decoder.decode(b"", final=True), end=reason)

    def _choose_tokens(self, request: GenerationRequest) -> Iterator[int]:
        """The script's tokens, as far as the grammar allows them; for ever, so that a limit must end it."""
        script = self._reply_token_ids(request.prompt_token_ids)
        mask = np.zeros((_VOCABULARY_SIZE + 31) // 32, dtype=np.int32)
        position = 0
        while True:
            wanted = script[position] if position < len(script) else _END
            token_id = wanted if request.state is None else _choose_allowed(request.state, wanted, mask)
            position += token_id == wanted
            yield token_id

    def _reply_token_ids(self, prompt_token_ids: Sequence[int]) -> list[int]:
        if self._script.reply is not None:
            return self.tokenize(self._script.reply)
        return _last_user_text(prompt_token_ids)

    async def _misbehave(self, count: int) -> None:
        script = self._script
        if count == script.die_after_tokens:
            os._exit(3)
        if count == script.raise_after_tokens:
            raise RuntimeError(f"The script says to fail after {count} tokens.")
        if count == script.hang_after_tokens:
            await asyncio.Event().wait()
        if count == script.freeze_after_tokens:
            time.sleep(3600)  # noqa: ASYNC251  freezing the event loop is the point

    def _to_chunk(
        self, token_id: int, decoder: codecs.IncrementalDecoder, request: GenerationRequest
    ) -> GeneratedChunk:
        logprobs = () if request.logprobs is None else (_logprob(token_id, request.logprobs),)
        if token_id in request.visible_control_tokens:
            name = next(name for name, id_ in _CONTROL_TOKENS.items() if id_ == token_id)
            return GeneratedChunk(control_token=name, logprobs=logprobs, sampled_tokens=1)
        text = decoder.decode(self.vocabulary.tokens[token_id])
        return GeneratedChunk(text=text, logprobs=logprobs, sampled_tokens=1)


def _prompt_logprobs(request: GenerationRequest) -> tuple[TokenLogprob | None, ...]:
    assert request.logprobs is not None, "prompt_logprobs goes with logprobs"
    return None, *(_logprob(token_id, request.logprobs) for token_id in request.prompt_token_ids[1:])


def _logprob(token_id: int, alternatives: int) -> TokenLogprob:
    """As if the token were certain."""
    top = tuple(((token_id + shift) % 256, -float(shift)) for shift in range(alternatives))
    return TokenLogprob(token_id, 0.0, top)


def _choose_allowed(state: State, wanted: int, mask: NDArray[np.int32]) -> int:
    """The wanted token where the grammar allows it, else one that it allows; the state takes it.

    Raises:
        ConstraintFailed: the state failed, or allows nothing.
    """
    may_end = state.status in ("may_end", "must_end")
    if state.status == "must_end" or (may_end and wanted == _END):
        return _END
    token_id = _first_allowed(wanted, may_end, _allowed_token_ids(state, mask))
    if token_id != _END and state.advance([token_id]) != 1:
        raise ConstraintFailed(f"The grammar refused token {token_id}, which its own mask allows.")
    return token_id


def _allowed_token_ids(state: State, mask: NDArray[np.int32]) -> list[int]:
    if not state.mask(mask):
        return list(range(256))
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:256]
    return [int(token_id) for token_id in np.flatnonzero(bits)]


def _first_allowed(wanted: int, may_end: bool, allowed: list[int]) -> int:
    if wanted in allowed:
        return wanted
    if may_end:
        return _END
    if not allowed:
        raise ConstraintFailed("The grammar allows no token and no end.")
    return next((byte for byte in _PREFERRED_BYTES if byte in allowed), allowed[0])


def _split_at_control_tokens(text: str) -> list[str]:
    return re.split("(" + "|".join(re.escape(name) for name in _CONTROL_TOKENS) + ")", text)


def _piece_token_ids(piece: str) -> list[int]:
    return [_CONTROL_TOKENS[piece]] if piece in _CONTROL_TOKENS else list(piece.encode())


def _last_user_text(prompt_token_ids: Sequence[int]) -> list[int]:
    """The bytes of the last user's message, as our own template writes it; without one all of the prompt."""
    prompt = list(prompt_token_ids)
    header = [_START, *b"user\n"]
    for start in range(len(prompt) - len(header), -1, -1):
        if prompt[start : start + len(header)] == header:
            text = prompt[start + len(header) :]
            return text[: text.index(_END)] if _END in text else text
    return [token_id for token_id in prompt if token_id < 256]
