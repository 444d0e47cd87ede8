"""One thread, one context, many sequences: each step computes one batch for all of them.

A slot's tokens are those of its prompt and answer so far; what of them is not yet in the KV cache is
pending. Reading a prompt, appending a sampled token, appending a run that the grammar forced and coming
back after the cache was full are all the same thing: pending tokens go into the next batch.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gallama.engines.llama_cpp.bindings import Candidates, DecodeFailed, KvCacheFull
from gallama.engines.llama_cpp.context import BatchPart, CachedSequence, SequenceCache, common_prefix
from gallama.engines.llama_cpp.sampling import Sampler, log_probabilities
from gallama.errors import ConstraintFailed, GallamaError, WorkerUnavailable
from gallama.generation import EndReason, EngineStatus, GenerationRequest, State, TokenLogprob

logger = logging.getLogger(__name__)

# While others write, a prompt is read in pieces of this many tokens, so that none of them stands still.
PROMPT_TOKENS_BESIDE_WRITERS = 128

# A prompt waits for one that is being read if it can then take over this many tokens more than now.
WORTH_WAITING_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Started:
    """The job has a slot."""

    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokensAdded:
    """What was added to the answer: one sampled token, or a run that the grammar forced."""

    token_ids: tuple[int, ...]
    were_forced: bool
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    reason: EndReason


Update = Started | TokensAdded | Ended | GallamaError


@dataclass(slots=True, eq=False)
class Job:
    """A request as the scheduler sees it. `cancelled` may be set from any thread."""

    request: GenerationRequest
    cancelled: bool = False


Sink = Callable[[Sequence[tuple[Job, Update]]], None]
"""Takes a step's updates for all jobs at once; called from the scheduler's thread."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A job that has a sequence of its own."""

    job: Job
    sequence: CachedSequence
    sampler: Sampler
    token_ids: list[int]
    prompt_length: int
    has_ended: bool = False

    @property
    def pending_count(self) -> int:
        return len(self.token_ids) - len(self.sequence.token_ids)

    @property
    def is_reading(self) -> bool:
        """Whether it still reads its prompt, so that nobody waits for its next token yet."""
        has_answer = len(self.token_ids) > self.prompt_length
        return not has_answer or self.pending_count > PROMPT_TOKENS_BESIDE_WRITERS

    @property
    def room(self) -> int:
        """Tokens that the answer may still grow by."""
        return self.job.request.max_tokens - (len(self.token_ids) - self.prompt_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    slots: int
    batch_tokens: int
    vocabulary_size: int
    context_length: int
    end_token_ids: frozenset[int]


class Scheduler:
    """Runs jobs until they end, side by side. Its public methods may be called from any thread."""

    def __init__(self, cache: SequenceCache, options: SchedulerOptions, sink: Sink) -> None:
        self._cache = cache
        self._options = options
        self._sink = sink
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._slots: list[_Slot] = []
        self._preempted: deque[_Slot] = deque()
        self._room_was_freed = False
        self._updates: list[tuple[Job, Update]] = []
        self._candidates = Candidates(options.vocabulary_size)
        self._mask = np.zeros((options.vocabulary_size + 31) // 32, dtype=np.int32)
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def start(self, warm_up: Callable[[], None]) -> None:
        """Run `warm_up` on the scheduler's thread, then jobs.

        No other thread may ever compute: OpenMP keeps threads for each that did, and once there are more of
        them than cores they sleep between any two operations, which costs a third of the speed.

        Raises:
            DecodeFailed: or whatever else `warm_up` raises.
        """
        warmed_up: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(warm_up, warmed_up), name="llama-scheduler", daemon=True
        )
        self._thread.start()
        warmed_up.result()

    def submit(self, job: Job) -> None:
        self._inbox.put(job)

    def cancel(self, job: Job) -> None:
        """End a job; its slot is free at the next step."""
        job.cancelled = True

    def status(self) -> EngineStatus:
        return EngineStatus(
            busy_slots=len(self._slots) + len(self._preempted),
            waiting=len(self._waiting) + self._inbox.qsize(),
            cached_tokens=self._cache.cached_tokens,
        )

    def close(self) -> None:
        """End after the step at hand; jobs under way end in an error."""
        self._is_closing = True
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, warm_up: Callable[[], None], warmed_up: Future[None]) -> None:
        try:
            warm_up()
        except BaseException as error:
            warmed_up.set_exception(error)
            return
        warmed_up.set_result(None)
        while not self._is_closing:
            try:
                self._receive()
                self._drop_cancelled()
                self._admit()
                self._step()
            except BaseException:  # this thread must outlive every bug: nobody would answer any more
                logger.exception("a step broke; %d answers are lost", len(self._slots))
                self._start_over(GallamaError("The answer could not be generated any further."))
            self._publish()
        self._end_all()

    def _end_all(self) -> None:
        """Let everybody know that there will be no more steps, also those who came only now."""
        error = WorkerUnavailable("The model is being unloaded.")
        self._fail_all(error)
        self._receive()
        for job in self._waiting:
            self._tell(job, error)
        self._publish()

    def _receive(self) -> None:
        """Take new jobs; with nothing to do, sleep until one comes."""
        has_work = self._slots or self._waiting or self._preempted
        may_sleep = not has_work and not self._is_closing
        while may_sleep or not self._inbox.empty():
            job = self._inbox.get()
            may_sleep = False
            if job is not None:
                self._waiting.append(job)

    def _drop_cancelled(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for slot in [slot for slot in (*self._slots, *self._preempted) if slot.job.cancelled]:
            self._free(slot)

    def _admit(self) -> None:
        """Give waiting jobs a slot each, in order; one that gains by it waits for another's prompt."""
        if self._preempted and (self._room_was_freed or not self._slots):
            self._resume(self._preempted.popleft())
        if self._preempted:
            return  # the cache is full
        held_back: list[Job] = []
        while self._waiting and len(self._slots) < self._options.slots:
            job = self._waiting.popleft()
            if self._gains_by_waiting(job):
                held_back.append(job)
            else:
                self._guard(partial(self._start_job, job), partial(self._tell, job))
        self._waiting.extendleft(reversed(held_back))

    def _gains_by_waiting(self, job: Job) -> bool:
        if _must_repeat(job.request):
            return False
        prompt = list(job.request.prompt_token_ids)
        soon = max(
            (common_prefix(slot.token_ids, prompt) for slot in self._slots if slot.is_reading), default=0
        )
        return soon >= self._cache.shared_tokens(prompt) + WORTH_WAITING_TOKENS

    def _start_job(self, job: Job) -> None:
        prompt = list(job.request.prompt_token_ids)
        sampler = Sampler(  # first, as it may refuse: there is no sequence to give back yet
            job.request.sampling,
            vocabulary_size=self._options.vocabulary_size,
            context_length=self._options.context_length,
            prompt_token_ids=prompt,
            candidates=self._candidates,
        )
        if _must_repeat(job.request) and not self._slots:
            self._cache.discard_all()
        sequence = self._cache.acquire(prompt, reuse=not _must_repeat(job.request))
        slot = _Slot(
            job=job,
            sequence=sequence,
            sampler=sampler,
            token_ids=prompt,
            prompt_length=len(prompt),
        )
        self._slots.append(slot)
        self._tell(job, Started(cached_prompt_tokens=len(sequence.token_ids)))
        self._guard(partial(self._append_forced, slot), partial(self._finish, slot))

    def _step(self) -> None:
        """Compute one batch and choose a token for each slot whose pending tokens are all in it."""
        parts = self._plan()
        if not parts:
            return
        try:
            logits = self._cache.decode([part for _, part in parts])
        except KvCacheFull:
            self._preempt_youngest()
            return
        except DecodeFailed:
            logger.exception("a batch failed; %d answers are lost", len(self._slots))
            self._start_over(GallamaError("The model could not be computed any further."))
            return
        for (slot, _), row in zip(parts, logits, strict=True):
            if row is not None:
                self._guard(partial(self._choose, slot, row), partial(self._finish, slot))

    def _plan(self) -> list[tuple[_Slot, BatchPart]]:
        """Who gets how much of the next batch: writers all they need, then readers, in order."""
        budget = self._options.batch_tokens
        # Those who need one token come first: a long forced run may take a few steps.
        writers = sorted(
            (slot for slot in self._slots if not slot.is_reading), key=lambda slot: slot.pending_count
        )
        readers = [slot for slot in self._slots if slot.is_reading]
        parts = []
        for slot in writers:
            parts.append((slot, _next_part(slot, budget)))
            budget -= len(parts[-1][1].token_ids)
        if writers:
            budget = min(budget, PROMPT_TOKENS_BESIDE_WRITERS)
        for slot in readers:
            parts.append((slot, _next_part(slot, budget)))
            budget -= len(parts[-1][1].token_ids)
        return [(slot, part) for slot, part in parts if part.token_ids]

    def _choose(self, slot: _Slot, logits: NDArray[np.float32]) -> None:
        state = slot.job.request.state
        mask = self._mask if state is not None and state.mask(self._mask) else None
        token = slot.sampler.sample(logits, mask)
        if token in self._options.end_token_ids:
            self._finish(slot, Ended("stop"))
            return
        if state is not None:
            _advance(state, [token])
        wanted = slot.job.request.logprobs
        logprobs = () if wanted is None else (log_probabilities(logits, token, wanted),)
        self._extend(slot, TokensAdded((token,), were_forced=False, logprobs=logprobs))
        if not slot.has_ended:
            self._append_forced(slot)

    def _append_forced(self, slot: _Slot) -> None:
        """Take what the grammar leaves no choice about: it needs no sampling, only a place in the batch."""
        state = slot.job.request.state
        if state is None or slot.job.request.logprobs is not None:
            return
        forced = state.forced()[: slot.room]
        if not forced:
            return
        _advance(state, forced)
        self._extend(slot, TokensAdded(tuple(forced), were_forced=True))

    def _extend(self, slot: _Slot, added: TokensAdded) -> None:
        """Add tokens to the answer, and end it where the grammar or a limit does."""
        slot.token_ids += added.token_ids
        slot.sampler.accept(added.token_ids)
        self._tell(slot.job, added)
        state = slot.job.request.state
        if state is not None and state.status == "must_end":
            self._finish(slot, Ended("stop"))
        elif slot.room <= 0:
            self._finish(slot, Ended("length"))

    def _finish(self, slot: _Slot, update: Update) -> None:
        self._tell(slot.job, update)
        self._free(slot)

    def _free(self, slot: _Slot) -> None:
        slot.has_ended = True
        slot.sampler.close()
        if slot in self._preempted:
            self._preempted.remove(slot)
            return
        self._slots.remove(slot)
        self._cache.release(slot.sequence)
        self._room_was_freed = True

    def _preempt_youngest(self) -> None:
        """The cache is full of busy sequences: the last to start waits, and goes on when there is room."""
        youngest = self._slots[-1]
        if len(self._slots) == 1:
            self._finish(
                youngest, GallamaError("The KV cache is too small for this request; raise `cache_size`.")
            )
            return
        self._slots.remove(youngest)
        self._cache.discard(youngest.sequence)
        self._preempted.appendleft(youngest)  # the others there are younger still
        self._room_was_freed = False

    def _resume(self, slot: _Slot) -> None:
        slot.sequence = self._cache.acquire(slot.token_ids)
        self._slots.append(slot)

    def _guard(self, action: Callable[[], None], fail: Callable[[GallamaError], None]) -> None:
        """Keep one job's error from the others. Rust panics are BaseExceptions, too."""
        try:
            action()
        except GallamaError as error:
            fail(error)
        except BaseException:
            logger.exception("an answer broke")
            fail(GallamaError("The answer could not be generated any further."))

    def _fail_all(self, error: GallamaError) -> None:
        for slot in (*self._slots, *self._preempted):
            self._finish(slot, error)

    def _start_over(self, error: GallamaError) -> None:
        """Give up what is under way, and the cache with it; what waits is not touched."""
        self._fail_all(error)
        self._cache.discard_all()

    def _tell(self, job: Job, update: Update) -> None:
        self._updates.append((job, update))

    def _publish(self) -> None:
        if self._updates:
            updates, self._updates = self._updates, []
            self._sink(updates)


def _must_repeat(request: GenerationRequest) -> bool:
    """Whether the client wants the same answer again, by its seed.

    What is computed in another batch, or stands elsewhere in the cache, differs in the last bits, enough
    to tip a sampled token now and then. So such a prompt is computed as a whole, and in an empty cache if
    nobody else is at work: then it does repeat.
    """
    return request.sampling.seed is not None and request.sampling.temperature != 0


def _advance(state: State, token_ids: list[int]) -> None:
    """Let a grammar take tokens that it has allowed; it refuses them only when it runs out of its limits."""
    if state.advance(token_ids) != len(token_ids):
        raise ConstraintFailed("The constraint engine gave up in the middle of the answer.")


def _next_part(slot: _Slot, budget: int) -> BatchPart:
    start = len(slot.sequence.token_ids)
    token_ids = slot.token_ids[start : start + budget]
    is_last = start + len(token_ids) == len(slot.token_ids)
    return BatchPart(slot.sequence, token_ids, wants_logits=is_last)
