"""One thread, one context, many sequences: each step computes one batch for all of them.

A slot's tokens are those of its prompt and answer so far; what of them is not yet in the KV cache is
pending. Reading a prompt, appending a sampled token, appending a run that the grammar forced and coming
back after the cache was full are all the same thing: pending tokens go into the next batch. A draft goes
behind them: as long as what is chosen is what was guessed, the next token can be chosen at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gallama.constraints.mask_batch import MaskBatch
from gallama.engines.answer_streams import (
    DraftChecked,
    Ended,
    Job,
    Outbox,
    Sink,
    Started,
    TokensAdded,
    Update,
)
from gallama.engines.job_inbox import JobInbox
from gallama.engines.llama_cpp.bindings import Candidates, DecodeFailed, KvCacheFull
from gallama.engines.llama_cpp.context import BatchPart, CachedSequence, SequenceCache, common_prefix
from gallama.engines.llama_cpp.sampling import Sampler
from gallama.engines.llama_cpp.speculation import MODEL_DRAFT, NO_DRAFT, Draft, Drafter, Trust, Wish
from gallama.engines.logits import log_probabilities
from gallama.engines.processor_cores import Cores
from gallama.engines.step_cost import StepCost
from gallama.errors import ConstraintFailed, GallamaError, WorkerUnavailable
from gallama.generation import EngineStatus, GenerationRequest, State, TokenLogprob

logger = logging.getLogger(__name__)

# A run of forced tokens that is longer than this is read as a prompt is: nobody waits for its next token yet.
LONG_RUN_TOKENS = 128

# While others write, a prompt is read in pieces of at least this many tokens, however slow the machine is.
LEAST_PROMPT_TOKENS = 16

# Tokens that are guessed in one step, by all slots together: each needs a row of logits.
MOST_DRAFTED_TOKENS = 64

# Tokens of prompts that are scored in one step, for all slots together: each needs a row of logits.
MOST_SCORED_TOKENS = 32

# A prompt waits for one that is being read if it can then take over this many tokens more than now.
WORTH_WAITING_TOKENS = 32


@dataclass(slots=True, eq=False)
class _Slot:
    """A job that has a sequence of its own."""

    job: Job
    sequence: CachedSequence
    sampler: Sampler
    token_ids: list[int]
    prompt_length: int
    trust: Trust
    draft: Draft = NO_DRAFT
    """What was computed on a guess behind its first `draft_start` tokens, and is being checked."""
    draft_start: int = 0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """Of the prompt's first tokens, as far as it was scored, where that is wanted."""
    has_chosen: bool = False
    """Whether a token of its answer was sampled."""
    has_ended: bool = False

    @property
    def pending_count(self) -> int:
        return len(self.token_ids) - len(self.sequence.token_ids)

    @property
    def is_reading(self) -> bool:
        """Whether it still reads its prompt, so that nobody waits for its next token yet."""
        return not self.has_chosen or self.pending_count > LONG_RUN_TOKENS

    @property
    def is_scoring(self) -> bool:
        """Whether log probabilities of its prompt are wanted that are not known yet."""
        return self.job.request.prompt_logprobs and len(self.prompt_logprobs) < self.prompt_length

    @property
    def room(self) -> int:
        """Tokens that the answer may still grow by."""
        return self.job.request.max_tokens - (len(self.token_ids) - self.prompt_length)


@dataclass(frozen=True, slots=True)
class _ReadPrompt:
    """A prompt that has just been read, while others with the same one wait: they start where it ends."""

    request: GenerationRequest
    token_ids: list[int]
    """The prompt, with what the grammar forced behind it."""
    sequence: CachedSequence
    logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Part:
    """What a slot gets of a batch: pending tokens, and a draft behind them if they are all in it."""

    slot: _Slot
    token_ids: list[int]
    is_last: bool
    draft: Draft = NO_DRAFT


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    slots: int
    batch_tokens: int
    vocabulary_size: int
    context_length: int
    end_token_ids: frozenset[int]
    probe_token_id: int
    jump_forward: bool = True
    """Whether tokens that the grammar forces go into the batch together; else each costs a step."""
    step_seconds: float = 0.2
    """How long a step may take because of a prompt while others write."""
    draft_tokens: int = 0
    """The most that is guessed for a slot in one step."""


class Scheduler:
    """Runs jobs until they end, side by side. Its public methods may be called from any thread."""

    def __init__(
        self,
        cache: SequenceCache,
        options: SchedulerOptions,
        sink: Sink,
        *,
        cores: Cores,
        set_threads: Callable[[int], None],
        drafter: Drafter | None = None,
    ) -> None:
        """
        Args:
            set_threads: called with how many threads are to compute, whenever that changes.
        """
        self._cache = cache
        self._cores = cores
        self._set_threads = set_threads
        self._threads = cores.threads()
        self._drafter = drafter
        self._options = options
        self._outbox = Outbox(sink)
        self._inbox = JobInbox()
        self._slots: list[_Slot] = []
        self._preempted: deque[_Slot] = deque()
        self._room_was_freed = False
        self._candidates = Candidates(options.vocabulary_size)
        self._masks = MaskBatch(options.vocabulary_size, options.slots, threads=self._threads)
        self._cost = StepCost()
        self._read_prompt: _ReadPrompt | None = None
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def start(self, warm_up: Callable[[], None]) -> None:
        """Run `warm_up` on the scheduler's thread, then jobs.

        No other thread may ever compute: OpenMP keeps threads for each that did, and once there are more of
        them than cores they sleep between any two operations, which costs a quarter of the speed.

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
        self._inbox.submit(job)

    def probe(self) -> Future[None]:
        """Compute a token and forget it, unless jobs are computed anyway; done once something was.

        The future fails with what the computation raises.
        """
        return self._inbox.probe()

    def cancel(self, job: Job) -> None:
        """End a job; its slot is free at the next step."""
        job.cancelled = True

    def status(self) -> EngineStatus:
        return EngineStatus(
            busy_slots=len(self._slots) + len(self._preempted),
            waiting=len(self._inbox),
            cached_tokens=self._cache.cached_tokens,
            **asdict(self._outbox.totals),
        )

    def close(self) -> None:
        """End after the step at hand; jobs under way end in an error."""
        self._is_closing = True
        self._inbox.wake()
        if self._thread is not None:
            self._thread.join()

    def _run(self, warm_up: Callable[[], None], warmed_up: Future[None]) -> None:
        try:
            self._take_cores()
            warm_up()
        except BaseException as error:
            self._cores.end_work()
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
            self._outbox.hand_over()
            self._inbox.answer_probes(None if self._slots else self._compute_for_nobody)
        self._end_all()

    def _end_all(self) -> None:
        """Let everybody know that there will be no more steps, also those who came only now."""
        error = WorkerUnavailable("The model is being unloaded.")
        self._fail_all(error)
        self._cores.end_work()
        self._inbox.receive(may_sleep=False)
        for job in self._inbox.waiting:
            self._tell(job, error)
        self._outbox.hand_over()
        self._inbox.refuse_probes(error)

    def _receive(self) -> None:
        """Take new jobs; with nothing to do, sleep until one comes."""
        may_sleep = not (self._slots or self._inbox.waiting or self._preempted)
        if may_sleep:
            self._cores.end_work()
        self._inbox.receive(may_sleep=may_sleep)

    def _drop_cancelled(self) -> None:
        self._inbox.drop_cancelled()
        for slot in [slot for slot in (*self._slots, *self._preempted) if slot.job.cancelled]:
            self._free(slot)

    def _admit(self) -> None:
        """Give waiting jobs a slot each, in order; one that gains by it waits for another's prompt."""
        if self._preempted and (self._room_was_freed or not self._slots):
            self._resume(self._preempted.popleft())
        if self._preempted:
            return  # the cache is full
        held_back: list[Job] = []
        waiting = self._inbox.waiting
        while waiting and len(self._slots) < self._options.slots:
            job = waiting.popleft()
            self._guard(partial(self._start_or_hold_back, job, held_back), partial(self._tell, job))
        waiting.extendleft(reversed(held_back))
        found = self._read_prompt
        if found is not None and not any(_repeats_as(found.request, job.request) for job in waiting):
            self._read_prompt = None

    def _start_or_hold_back(self, job: Job, held_back: list[Job]) -> None:
        if self._gains_by_waiting(job):
            held_back.append(job)
        else:
            self._start_job(job)

    def _gains_by_waiting(self, job: Job) -> bool:
        if job.request.prompt_logprobs:
            return False  # it computes all of its prompt itself
        prompt = list(job.request.prompt_token_ids)
        # A prompt that is scored is read in small pieces: reading it oneself takes less time.
        readers = [slot for slot in self._slots if slot.is_reading and not slot.is_scoring]
        if _must_repeat(job.request):
            return any(_repeats_as(slot.job.request, job.request) for slot in readers)
        soon = max((self._cache.shared_with_busy(slot.token_ids, prompt) for slot in readers), default=0)
        return soon >= self._cache.shared_tokens(prompt) + WORTH_WAITING_TOKENS

    def _start_job(self, job: Job) -> None:
        request = job.request
        prompt = list(request.prompt_token_ids)
        token_ids = prompt + self._forced(request, request.max_tokens)
        sampler = Sampler(  # first, as it may refuse: there is no sequence to give back yet
            request.sampling,
            vocabulary_size=self._options.vocabulary_size,
            context_length=self._options.context_length,
            prompt_token_ids=prompt,
            candidates=self._candidates,
        )
        read_prompt = self._prompt_read_before(token_ids, request)
        try:
            sequence = self._sequence_for(token_ids, request, read_prompt)
        except BaseException:
            sampler.close()
            raise
        slot = _Slot(
            job=job,
            sequence=sequence,
            sampler=sampler,
            token_ids=prompt,
            prompt_length=len(prompt),
            trust=Trust(),
            prompt_logprobs=[None] if request.prompt_logprobs else [],
        )
        self._slots.append(slot)
        self._begin_answer(slot)
        fail = partial(self._finish, slot)
        self._guard(partial(self._append_forced, slot), fail)
        if read_prompt is not None and not slot.has_ended:
            self._masks.compute([request.state])
            self._guard(partial(self._choose, slot, read_prompt.logits, 0), fail)

    def _sequence_for(
        self, token_ids: list[int], request: GenerationRequest, read_prompt: _ReadPrompt | None
    ) -> CachedSequence:
        if read_prompt is not None:
            return self._cache.fork(read_prompt.sequence, len(token_ids))
        if _must_repeat(request) and not self._slots:
            self._cache.shelve_all()
        computes_all = _must_repeat(request) or request.prompt_logprobs
        return self._cache.acquire(token_ids, reuse=not computes_all)

    def _prompt_read_before(self, token_ids: list[int], request: GenerationRequest) -> _ReadPrompt | None:
        """The same prompt, if it was read while this job waited, and is still in the cache."""
        found = self._read_prompt
        if (
            found is None
            or request.prompt_logprobs
            or found.token_ids != token_ids
            or not _repeats_as(found.request, request)
        ):
            return None
        is_there = found.sequence.token_ids[: len(token_ids)] == token_ids
        return found if is_there and found.sequence.least_tokens <= len(token_ids) else None

    def _step(self) -> None:
        """Compute one batch and choose tokens for each slot whose pending tokens are all in it."""
        self._take_cores()
        parts = self._plan()
        if not parts:
            return
        start = time.perf_counter()
        try:
            batch = self._decode(parts)
        except KvCacheFull:
            self._preempt_youngest()
            return
        except DecodeFailed:
            logger.exception("a batch failed; %d answers are lost", len(self._slots))
            self._start_over(GallamaError("The model could not be computed any further."))
            return
        self._outbox.totals.steps += 1
        whole = [part for part in parts if part.is_last]
        self._masks.compute([part.slot.job.request.state for part in whole])
        rows = self._cache.logits(batch)
        if any(rows):  # else a GPU may not have done it yet
            self._cost.record(sum(len(part.token_ids) for part in batch), time.perf_counter() - start)
        mask_rows = {id(part): index for index, part in enumerate(whole)}
        for part, part_rows in zip(parts, rows, strict=True):
            if part_rows:
                mask_row = mask_rows.get(id(part))
                action = partial(self._use_logits, part, part_rows, mask_row)
                self._guard(action, partial(self._finish, part.slot))

    def _use_logits(self, part: _Part, rows: list[NDArray[np.float32]], mask_row: int | None) -> None:
        """Do what a slot's logits were computed for: score its prompt, then write its answer.

        Args:
            mask_row: its row in this step's masks; None: it is not so far yet.
        """
        if part.slot.is_scoring:
            self._score_prompt(part, rows)
            rows = rows[-1:]
        if mask_row is not None and not part.slot.has_ended:
            self._write(part, rows, mask_row)

    def _score_prompt(self, part: _Part, rows: list[NDArray[np.float32]]) -> None:
        """Note the log probabilities of prompt tokens; each is foretold by the logits before it."""
        slot = part.slot
        wanted = slot.job.request.logprobs
        assert wanted is not None, "prompt_logprobs goes with logprobs"
        first = len(slot.sequence.token_ids) - len(rows) + 1
        for place, row in enumerate(rows, first):
            # After the cache was full, it computes again what was scored before.
            if slot.is_scoring and place == len(slot.prompt_logprobs):
                slot.prompt_logprobs.append(log_probabilities(row, slot.token_ids[place], wanted))
        self._begin_answer(slot)

    def _begin_answer(self, slot: _Slot) -> None:
        """Tell that the slot has started, unless its prompt is to be scored first."""
        if slot.is_scoring:
            return
        cached = 0 if slot.prompt_logprobs else min(len(slot.sequence.token_ids), slot.prompt_length)
        self._tell(slot.job, Started(cached, tuple(slot.prompt_logprobs)))
        if slot.room <= 0:
            self._finish(slot, Ended("length"))

    def _compute_for_nobody(self) -> None:
        """Compute a token while there is nothing else to do."""
        try:
            self._take_cores()
            self._cache.probe(self._options.probe_token_id)
        except BaseException:
            self._start_over(GallamaError("The model could not be computed any further."))
            raise
        self._outbox.totals.steps += 1

    def _decode(self, parts: list[_Part]) -> list[BatchPart]:
        """Compute the parts, those of answers without their drafts where there is no room for these.

        Raises:
            KvCacheFull, DecodeFailed: as `SequenceCache.decode`.
        """
        batch = [_to_batch_part(part) for part in parts]
        try:
            self._cache.decode(batch)
        except KvCacheFull:
            if not any(part.draft.token_ids for part in parts):
                raise
            parts[:] = [replace(part, draft=NO_DRAFT) for part in parts]
            return self._decode(parts)
        return batch

    def _take_cores(self) -> None:
        """Compute on as many cores as the workers beside this one leave it."""
        self._cores.begin_work()
        threads = self._cores.threads()
        if threads != self._threads:
            self._threads = threads
            self._set_threads(threads)

    def _plan(self) -> list[_Part]:
        """Who gets how much of the next batch: writers all they need, then readers, in order."""
        budget = self._options.batch_tokens
        # Those who need one token come first: a long forced run may take a few steps.
        writers = sorted(
            (slot for slot in self._slots if not slot.is_reading), key=lambda slot: slot.pending_count
        )
        readers = [slot for slot in self._slots if slot.is_reading]
        parts = []
        for slot, most_tokens in zip(writers, self._shares(writers), strict=True):
            parts.append(_next_part(slot, min(most_tokens, budget)))
            budget -= len(parts[-1].token_ids)
        if self._drafter is not None and (self._cache.shares_cells or len(parts) == 1):
            # Beside others with cells of their own, a draft would be computed in steps of its own.
            parts = self._with_drafts(parts, budget)
            budget -= sum(len(part.draft.token_ids) for part in parts)
        if writers:
            in_time = self._cost.tokens_within(self._options.step_seconds)
            budget = min(budget, max(in_time, LEAST_PROMPT_TOKENS))
            if not self._cache.shares_cells:
                readers = readers[:1]  # pieces of several lengths would be computed one after the other
        rows = MOST_SCORED_TOKENS
        for slot in readers:
            parts.append(_next_part(slot, min(budget, rows) if slot.is_scoring else budget))
            length = len(parts[-1].token_ids)
            budget -= length
            rows -= length if slot.is_scoring else 0
        # In this order, sequences with cells of their own are computed together.
        return sorted((part for part in parts if part.token_ids), key=lambda part: part.slot.sequence.id)

    def _shares(self, writers: list[_Slot]) -> list[int]:
        """How many pending tokens each writer may have in the batch."""
        pending = [slot.pending_count for slot in writers]
        if self._cache.shares_cells:
            return pending
        return even_shares(pending, [slot.sequence.id for slot in writers])

    def _with_drafts(self, parts: list[_Part], budget: int) -> list[_Part]:
        """The parts, each with a guess at what comes behind it where that may pay."""
        assert self._drafter is not None
        step_tokens = sum(len(part.token_ids) for part in parts)
        wishing = {id(part): wish for part in parts if (wish := self._wish(part, step_tokens))}
        drafts = dict(zip(wishing, self._guess(list(wishing.values())), strict=False))
        room = min(budget, MOST_DRAFTED_TOKENS)
        with_drafts = []
        for part in parts:
            draft = drafts.get(id(part), NO_DRAFT)
            most_tokens = min(len(draft.token_ids), room)
            part.slot.trust.watch(part.slot.token_ids, draft)
            length = part.slot.trust.best_length(most_tokens, draft.kind, step_tokens, self._cost)
            with_drafts.append(replace(part, draft=Draft(draft.token_ids[:length], draft.kind)))
            room -= length
            step_tokens += length
        return with_drafts

    def _guess(self, wishes: list[Wish]) -> list[Draft]:
        """Drafts for the wishes; none, from here on, if the drafter breaks: it must not cost an answer."""
        assert self._drafter is not None
        try:
            return self._drafter.draft(wishes)
        except BaseException:
            logger.exception("the drafter broke; answers go on without drafts")
            self._drafter = None
            return []

    def _wish(self, part: _Part, step_tokens: int) -> Wish | None:
        """How much of a guess a slot would like; None: none."""
        assert self._drafter is not None
        slot = part.slot
        # One more is chosen behind a draft that is right as a whole.
        most_tokens = min(self._options.draft_tokens, slot.room - 1)
        # How much pays differs from run to run, and with it what is computed together.
        if not part.is_last or most_tokens <= 0 or _must_repeat(slot.job.request):
            return None
        if seconds := self._drafter.seconds_per_token:
            most_tokens = slot.trust.best_length(most_tokens, MODEL_DRAFT, step_tokens, self._cost, seconds)
        if not most_tokens:
            return None
        return Wish(slot, slot.token_ids, most_tokens, slot.job.request.state, slot.prompt_length)

    def _write(self, part: _Part, rows: list[NDArray[np.float32]], mask_row: int) -> None:
        """Choose the slot's next token, and one more for each that was guessed before it."""
        slot, computed = part.slot, part.slot.sequence.token_ids
        start = written = len(slot.token_ids)
        slot.draft, slot.draft_start = part.draft, start
        self._remember_prompt(slot, rows[0])
        try:
            while not slot.has_ended and computed[start:written] == slot.token_ids[start:]:
                self._choose(slot, rows[written - start], mask_row)
                written = len(slot.token_ids)
                if written - start >= len(rows):
                    break
        finally:
            self._settle_draft(slot)

    def _settle_draft(self, slot: _Slot) -> None:
        """Take back what was guessed wrong, if something was guessed."""
        draft, slot.draft = slot.draft, NO_DRAFT
        drafted = len(draft.token_ids)
        if not drafted:
            return
        accepted = common_prefix(draft.token_ids, slot.token_ids[slot.draft_start :])
        self._cache.shorten(slot.sequence, slot.draft_start + accepted)
        self._tell(slot.job, DraftChecked(drafted, accepted))
        slot.trust.record(draft.kind, drafted, accepted)

    def _remember_prompt(self, slot: _Slot, logits: NDArray[np.float32]) -> None:
        """Keep what comes behind a prompt, for those who wait with the same one."""
        if slot.has_chosen:
            return
        request = slot.job.request
        is_awaited = any(_repeats_as(request, job.request) for job in self._inbox.waiting)
        if is_awaited and self._cache.can_forget_partly:
            self._read_prompt = _ReadPrompt(request, slot.token_ids.copy(), slot.sequence, logits.copy())

    def _choose(self, slot: _Slot, logits: NDArray[np.float32], mask_row: int) -> None:
        """Add one token to the answer, and what the grammar forces behind it.

        Args:
            mask_row: the slot's row in this step's masks.
        """
        state = slot.job.request.state
        slot.has_chosen = True
        token = slot.sampler.sample(logits, self._masks.mask(mask_row, state))
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
        forced = self._forced(slot.job.request, slot.room)
        if not forced:
            return
        assert slot.job.request.state is not None
        _advance(slot.job.request.state, forced)
        self._extend(slot, TokensAdded(tuple(forced), were_forced=True))

    def _forced(self, request: GenerationRequest, most_tokens: int) -> list[int]:
        if request.state is None or request.logprobs is not None or not self._options.jump_forward:
            return []
        return request.state.forced()[:most_tokens]

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
        if slot.has_ended:
            return
        self._settle_draft(slot)
        self._tell(slot.job, update)
        self._free(slot)

    def _free(self, slot: _Slot) -> None:
        slot.has_ended = True
        slot.sampler.close()
        self._forget_drafts(slot)
        if slot in self._preempted:
            self._preempted.remove(slot)
            return
        self._slots.remove(slot)
        self._cache.release(slot.sequence)
        self._room_was_freed = True

    def _forget_drafts(self, slot: _Slot) -> None:
        try:
            if self._drafter is not None:
                self._drafter.forget(slot)
        except BaseException:
            logger.exception("the drafter broke; answers go on without drafts")
            self._drafter = None

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
        slot.sequence = self._cache.acquire(slot.token_ids, reuse=not slot.is_scoring)
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
            self._guard(partial(self._finish, slot, error), partial(self._tell, slot.job))

    def _start_over(self, error: GallamaError) -> None:
        """Give up what is under way, and the cache with it; what waits is not touched."""
        self._cache.discard_all()  # first: nothing of it must be kept on the shelf
        self._fail_all(error)

    def _tell(self, job: Job, update: Update) -> None:
        self._outbox.tell(job, update)


def even_shares(pending: Sequence[int], sequences: Sequence[int]) -> list[int]:
    """How many of their pending tokens sequences get that do not share cells: few different numbers.

    llama.cpp computes such a batch in layers, each as high as the lowest of the sequences that are left, and
    of neighbours only; each layer costs a step of its own. So everybody gets as much as the lowest, and some
    of the others get more, all alike, if the layers are as well filled with that as a step is.

    Args:
        pending: each at least 1, in rising order.
        sequences: the ids.
    """
    lowest = pending[0] if pending else 0
    for index, height in enumerate(pending):
        higher = sequences[index:]
        layers = sum(sequence - 1 not in higher for sequence in higher)
        if height > lowest and (height - lowest) * len(higher) >= layers * len(pending):
            return [lowest] * index + [height] * len(higher)
    return [lowest] * len(pending)


def _must_repeat(request: GenerationRequest) -> bool:
    """Whether the client wants the same answer again, by its seed.

    What is computed in another batch, or stands elsewhere in the cache, differs in the last bits, enough
    to tip a sampled token now and then. So such a prompt is computed as a whole, and in an empty cache if
    nobody else is at work: then it does repeat.
    """
    return request.sampling.seed is not None and request.sampling.temperature != 0


def _repeats_as(one: GenerationRequest, other: GenerationRequest) -> bool:
    """Whether both have the same prompt, read it in the same pieces, and both or neither must repeat."""
    return (
        _must_repeat(one) == _must_repeat(other)
        and one.prompt_logprobs == other.prompt_logprobs
        and list(one.prompt_token_ids) == list(other.prompt_token_ids)
    )


def _advance(state: State, token_ids: list[int]) -> None:
    """Let a grammar take tokens that it has allowed; it refuses them only when it runs out of its limits."""
    if state.advance(token_ids) != len(token_ids):
        raise ConstraintFailed("The constraint engine gave up in the middle of the answer.")


def _next_part(slot: _Slot, budget: int) -> _Part:
    start = len(slot.sequence.token_ids)
    token_ids = slot.token_ids[start : start + budget]
    return _Part(slot, token_ids, is_last=start + len(token_ids) == len(slot.token_ids))


def _to_batch_part(part: _Part) -> BatchPart:
    if part.slot.is_scoring:
        return BatchPart(part.slot.sequence, part.token_ids, logits=len(part.token_ids))
    rows = 1 + len(part.draft.token_ids) if part.is_last else 0
    return BatchPart(part.slot.sequence, [*part.token_ids, *part.draft.token_ids], logits=rows)
