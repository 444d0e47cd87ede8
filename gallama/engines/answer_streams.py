"""From the one thread that computes to the streams that are read: what each step adds to each answer.

A thread of the engine's own runs the jobs, and after each step hands over what it has for all of them. Each
answer's reader, on the event loop, makes chunks of text of its part.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass

from gallama.errors import GallamaError, WorkerUnavailable
from gallama.generation import (
    EndReason,
    GeneratedChunk,
    GenerationRequest,
    TokenLogprob,
    Vocabulary,
)


@dataclass(frozen=True, slots=True)
class Started:
    """The job has a slot, and what it wants to know of its prompt is known."""

    cached_prompt_tokens: int
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class TokensAdded:
    """What was added to the answer: one sampled token, or a run that the grammar forced."""

    token_ids: tuple[int, ...]
    were_forced: bool
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class DraftChecked:
    """What became of a draft; comes behind the tokens that were chosen with it."""

    drafted_tokens: int
    accepted_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    reason: EndReason


Update = Started | TokensAdded | DraftChecked | Ended | GallamaError


@dataclass(slots=True, eq=False)
class Job:
    """A request as the thread that computes sees it. `cancelled` may be set from any thread."""

    request: GenerationRequest
    cancelled: bool = False


Sink = Callable[[Sequence[tuple[Job, Update]]], None]
"""Takes a step's updates for all jobs at once; called from the thread that computes."""


@dataclass(slots=True)
class Totals:
    """Of one engine since it was loaded, as `EngineStatus` tells them."""

    steps: int = 0
    sampled_tokens: int = 0
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_draft_tokens: int = 0

    def count(self, update: Update) -> None:
        match update:
            case TokensAdded(were_forced=True):
                self.forced_tokens += len(update.token_ids)
            case TokensAdded():
                self.sampled_tokens += len(update.token_ids)
            case DraftChecked():
                self.drafted_tokens += update.drafted_tokens
                self.accepted_draft_tokens += update.accepted_tokens
            case _:
                pass


class Outbox:
    """What a step has for all jobs, counted, until it is handed over. Used by the thread that computes."""

    def __init__(self, sink: Sink) -> None:
        self.totals = Totals()
        self._sink = sink
        self._updates: list[tuple[Job, Update]] = []

    def tell(self, job: Job, update: Update) -> None:
        self.totals.count(update)
        self._updates.append((job, update))

    def hand_over(self) -> None:
        if self._updates:
            updates, self._updates = self._updates, []
            self._sink(updates)


class AnswerStreams:
    """The answers that are being read. Used on one event loop, but for `hand_over`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._names = {token_id: name for name, token_id in vocabulary.control_tokens.items()}
        self._queues: dict[Job, asyncio.Queue[Update]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    async def read(
        self, request: GenerationRequest, submit: Callable[[Job], None], cancel: Callable[[Job], None]
    ) -> AsyncGenerator[GeneratedChunk, None]:
        """The chunks of one answer, whose job is submitted now; closing the generator cancels it.

        Raises:
            GallamaError: whatever the job ended in.
            WorkerUnavailable: the engine is closed.
        """
        self.refuse_if_closed()
        self._loop = asyncio.get_running_loop()
        job = Job(request)
        updates = self._queues[job] = asyncio.Queue()
        text = _TextAssembler(self._vocabulary.tokens, self._visible_names(request))
        submit(job)
        try:
            while True:
                update = await updates.get()
                match update:
                    case GallamaError():
                        raise update
                    case Started():
                        yield GeneratedChunk(
                            cached_prompt_tokens=update.cached_prompt_tokens,
                            prompt_logprobs=update.prompt_logprobs,
                        )
                    case TokensAdded():
                        for chunk in text.chunks(update):
                            yield chunk
                    case DraftChecked():
                        yield GeneratedChunk(
                            drafted_tokens=update.drafted_tokens,
                            accepted_draft_tokens=update.accepted_tokens,
                        )
                    case Ended():
                        yield GeneratedChunk(text=text.rest(), end=update.reason)
                        return
        finally:
            cancel(job)
            del self._queues[job]

    def hand_over(self, updates: Sequence[tuple[Job, Update]]) -> None:
        """Called by the thread that computes: one wake-up of the event loop for all jobs of a step."""
        assert self._loop is not None, "a job was submitted from a loop"
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._distribute, updates)

    def close(self) -> None:
        """Take no more requests."""
        self._is_closed = True

    def refuse_if_closed(self) -> None:
        """
        Raises:
            WorkerUnavailable: it is closed.
        """
        if self._is_closed:
            raise WorkerUnavailable("The model is being unloaded.")

    def _distribute(self, updates: Sequence[tuple[Job, Update]]) -> None:
        for job, update in updates:
            if job in self._queues:  # else its reader has left
                self._queues[job].put_nowait(update)

    def _visible_names(self, request: GenerationRequest) -> dict[int, str]:
        return {token: self._names[token] for token in request.visible_control_tokens}


class _TextAssembler:
    """Token ids to text that is never cut inside a character."""

    def __init__(self, tokens: Sequence[bytes], visible_names: dict[int, str]) -> None:
        self._tokens = tokens
        self._visible_names = visible_names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def chunks(self, added: TokensAdded) -> Iterator[GeneratedChunk]:
        """The added tokens as chunks; a visible control token is one of its own."""
        text, count = "", 0
        for token_id in added.token_ids:
            if token_id in self._visible_names:
                yield from self._text_chunk(text + self.rest(), count, added)
                yield self._control_chunk(token_id, added)
                text, count = "", 0
            else:
                text += self._decoder.decode(self._tokens[token_id])
                count += 1
        yield from self._text_chunk(text, count, added)

    def rest(self) -> str:
        """What is left of a character that will not be finished."""
        return self._decoder.decode(b"", final=True)

    def _text_chunk(self, text: str, count: int, added: TokensAdded) -> Iterator[GeneratedChunk]:
        if count or text:
            yield GeneratedChunk(
                text=text,
                logprobs=added.logprobs if count else (),
                sampled_tokens=0 if added.were_forced else count,
                forced_tokens=count if added.were_forced else 0,
            )

    def _control_chunk(self, token_id: int, added: TokensAdded) -> GeneratedChunk:
        return GeneratedChunk(
            control_token=self._visible_names[token_id],
            logprobs=added.logprobs,
            sampled_tokens=int(not added.were_forced),
            forced_tokens=int(added.were_forced),
        )
