"""One thread, one model, many texts: each step computes a piece of every text that is under way.

A slot's tokens are those of its prompt and answer so far; what of them is not yet in its cache is pending.
Reading a prompt, appending a sampled token and appending a run that the grammar forced are all the same
thing: pending tokens go into the next step. When the caches together grow too large, the youngest text loses
its own and is computed anew when there is room. When a step breaks, all lose theirs, and the oldest text is
computed alone: only what breaks by itself ends in an error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial

import torch
from transformers import DynamicCache

from gallama.constraints.mask_batch import MaskBatch
from gallama.engines.answer_streams import Ended, Job, Outbox, Sink, Started, TokensAdded, Update
from gallama.engines.job_inbox import JobInbox
from gallama.engines.logits import log_probabilities
from gallama.engines.processor_cores import Cores
from gallama.engines.step_cost import StepCost
from gallama.engines.transformers.computation import CausalModel
from gallama.engines.transformers.kept_texts import ComputedText, KeptTexts, common_prefix
from gallama.engines.transformers.packing import Piece
from gallama.engines.transformers.sampling import Sampler
from gallama.errors import ConstraintFailed, GallamaError, NotEnoughMemory, WorkerUnavailable
from gallama.generation import EngineStatus, GenerationRequest, State, TokenLogprob

logger = logging.getLogger(__name__)

# A run of forced tokens that is longer than this is read as a prompt is: nobody waits for its next token yet.
LONG_RUN_TOKENS = 128

# While others write, a prompt is read in pieces of at least this many tokens, however slow the machine is.
LEAST_PROMPT_TOKENS = 16

# Tokens of prompts that are scored in one step, for all slots together: each needs a row of logits.
MOST_SCORED_TOKENS = 32

# A prompt waits for one that is being read if it can then take over this many tokens more than now.
WORTH_WAITING_TOKENS = 32


@dataclass(slots=True, eq=False)
class _Slot:
    """A job that is under way."""

    job: Job
    sampler: Sampler
    token_ids: list[int]
    prompt_length: int
    cache: DynamicCache
    computed: int
    """How many of its tokens are in the cache."""
    prompt_logprobs: list[TokenLogprob | None]
    """Of the prompt's first tokens, as far as it was scored, where that is wanted."""
    has_chosen: bool = False
    """Whether a token of its answer was sampled."""
    has_ended: bool = False

    @property
    def pending_count(self) -> int:
        return len(self.token_ids) - self.computed

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
class _Part:
    """What a slot gets of a step."""

    slot: _Slot
    token_ids: list[int]

    @property
    def is_last(self) -> bool:
        return len(self.token_ids) == self.slot.pending_count

    @property
    def rows(self) -> int:
        return len(self.token_ids) if self.slot.is_scoring else int(self.is_last)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    slots: int
    batch_tokens: int
    """Tokens of prompts in one step, at most."""
    cache_tokens: int
    """Tokens in the caches of all texts together, at most."""
    vocabulary_size: int
    unused_token_ids: Sequence[int]
    """Ids below the vocabulary's size that no token has."""
    end_token_ids: frozenset[int]
    probe_token_id: int
    step_seconds: float = 0.2
    """How long a step may take because of a prompt while others write."""


class Scheduler:
    """Runs jobs until they end, side by side. Its public methods may be called from any thread."""

    def __init__(self, model: CausalModel, options: SchedulerOptions, sink: Sink, *, cores: Cores) -> None:
        self._model = model
        self._options = options
        self._outbox = Outbox(sink)
        self._cores = cores
        self._threads = 0
        self._inbox = JobInbox()
        self._slots: list[_Slot] = []
        self._preempted: deque[_Slot] = deque()
        self._room_was_freed = False
        self._kept = KeptTexts()
        self._masks = MaskBatch(options.vocabulary_size, options.slots, threads=max(1, cores.threads()))
        self._cost = StepCost()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Compute a first token on the scheduler's thread, then jobs.

        Raises:
            ModelLoadFailed: the model does not work as this engine needs it; or what else computing raises.
        """
        checked: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(checked,), name="transformers-scheduler", daemon=True
        )
        self._thread.start()
        checked.result()

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
            cached_tokens=self._busy_tokens() + self._kept.tokens,
            **asdict(self._outbox.totals),
        )

    def close(self) -> None:
        """End after the step at hand; jobs under way end in an error."""
        self._is_closing = True
        self._inbox.wake()
        if self._thread is not None:
            self._thread.join()

    def _run(self, checked: Future[None]) -> None:
        with torch.inference_mode():
            try:
                self._take_cores()
                self._model.check(self._options.probe_token_id)
            except BaseException as error:
                self._cores.end_work()
                checked.set_exception(error)
                return
            checked.set_result(None)
            while not self._is_closing:
                steps = self._outbox.totals.steps
                try:
                    self._receive()
                    self._drop_cancelled()
                    self._admit()
                    self._step()
                except BaseException as error:  # this thread must outlive every bug, or nobody answers
                    logger.exception("a step broke; %d answers are lost", len(self._slots))
                    self._start_over(_as_told(error))
                self._outbox.hand_over()
                has_computed = self._outbox.totals.steps > steps
                self._inbox.answer_probes(None if has_computed else self._compute_for_nobody)
            self._end_all()

    def _end_all(self) -> None:
        """Let everybody know that there will be no more steps, also those who came only now."""
        error = WorkerUnavailable("The model is being unloaded.")
        self._start_over(error)
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
            self._slots.append(self._preempted.popleft())
        if self._preempted:
            return  # the caches are full
        held_back: list[Job] = []
        waiting = self._inbox.waiting
        while waiting and len(self._slots) < self._options.slots:
            job = waiting.popleft()
            if self._gains_by_waiting(job):
                held_back.append(job)
            else:
                self._guard(partial(self._start_job, job), partial(self._tell, job))
        waiting.extendleft(reversed(held_back))

    def _gains_by_waiting(self, job: Job) -> bool:
        if not self._may_reuse(job.request):
            return False
        prompt = list(job.request.prompt_token_ids)
        readers = [slot for slot in self._slots if slot.is_reading]
        soon = max((common_prefix(slot.token_ids, prompt) for slot in readers), default=0)
        return soon >= WORTH_WAITING_TOKENS and soon >= self._shared(prompt)[1] + WORTH_WAITING_TOKENS

    def _start_job(self, job: Job) -> None:
        request = job.request
        prompt = list(request.prompt_token_ids)
        sampler = Sampler(
            request.sampling,
            prompt_token_ids=prompt,
            unused_token_ids=self._options.unused_token_ids,
            vocabulary_size=self._options.vocabulary_size,
            device=self._model.logits_device,
        )
        cache, computed = self._cache_for(request)
        slot = _Slot(
            job=job,
            sampler=sampler,
            token_ids=prompt,
            prompt_length=len(prompt),
            cache=cache,
            computed=computed,
            prompt_logprobs=[None] if request.prompt_logprobs else [],
        )
        self._slots.append(slot)
        self._begin_answer(slot)
        if not slot.has_ended:
            self._guard(partial(self._append_forced, slot), partial(self._finish, slot))

    def _cache_for(self, request: GenerationRequest) -> tuple[DynamicCache, int]:
        """A cache with as much of the prompt as was computed before; the last token is always computed."""
        if not self._may_reuse(request):
            return self._model.new_cache(), 0
        prompt = list(request.prompt_token_ids)
        found, shared = self._shared(prompt[:-1])
        if found is None or not shared:
            return self._model.new_cache(), 0
        self._kept.use(found)
        return self._model.fork(found.cache, shared), shared

    def _may_reuse(self, request: GenerationRequest) -> bool:
        return self._model.can_fork and not request.prompt_logprobs and not _must_repeat(request)

    def _shared(self, token_ids: list[int]) -> tuple[ComputedText | None, int]:
        """The text, be it under way or kept, of which most can be taken over, and how many tokens that is."""
        texts = [ComputedText(slot.token_ids[: slot.computed], slot.cache) for slot in self._slots]
        if (kept := self._kept.most_alike(token_ids)) is not None:
            texts.append(kept)
        found = max(texts, key=lambda text: common_prefix(text.token_ids, token_ids), default=None)
        return found, 0 if found is None else common_prefix(found.token_ids, token_ids)

    def _step(self) -> None:
        """Compute one piece of each slot, and choose tokens for those whose pending tokens are all in it."""
        self._take_cores()
        parts = self._plan()
        if not parts or not self._make_room(sum(len(part.token_ids) for part in parts)):
            return
        start = time.perf_counter()
        rows = self._compute(parts)
        if rows is None:
            return
        whole = [part.slot for part in parts if part.is_last]
        self._outbox.totals.steps += 1
        for part in parts:
            part.slot.computed += len(part.token_ids)
        self._masks.compute([slot.job.request.state for slot in whole])
        for part, logits in zip(parts, rows, strict=True):
            mask_row = whole.index(part.slot) if part.slot in whole else None
            if len(logits):
                self._guard(
                    partial(self._use_logits, part.slot, logits, mask_row), partial(self._finish, part.slot)
                )
        self._cost.record(sum(len(part.token_ids) for part in parts), time.perf_counter() - start)

    def _compute(self, parts: Sequence[_Part]) -> list[torch.Tensor] | None:
        """The logits of each part; None: that broke, be it for want of memory, so plan again."""
        try:
            return self._model.compute(
                [Piece(part.slot.cache, part.token_ids, rows=part.rows) for part in parts]
            )
        except Exception as error:
            logger.exception("a step with %d answers broke", len(parts))
            told = _as_told(error)
        # Only here, where nobody holds the tensors of the broken step any more.
        self._go_on_alone(told)
        return None

    def _go_on_alone(self, error: GallamaError) -> None:
        """After a step that broke: the oldest text is computed anew, alone, until it has ended.

        One that breaks alone ends in the error.
        """
        oldest, *others = self._slots
        if not others:
            self._finish(oldest, error)
        for slot in self._slots:  # half of the step may be in its cache
            slot.cache, slot.computed = self._model.new_cache(), 0
        for slot in reversed(others):
            self._slots.remove(slot)
            self._preempted.appendleft(slot)
        self._room_was_freed = False
        self._kept.clear()

    def _plan(self) -> list[_Part]:
        """Who gets how much of the next step: writers all they need, then readers, in order."""
        writers = [slot for slot in self._slots if not slot.is_reading]
        parts = [self._part(slot, LONG_RUN_TOKENS) for slot in writers]
        budget = self._options.batch_tokens
        if writers:
            in_time = self._cost.tokens_within(self._options.step_seconds)
            budget = min(budget, max(in_time, LEAST_PROMPT_TOKENS))
        scored = MOST_SCORED_TOKENS
        for slot in self._slots:
            most_tokens = min(budget, scored) if slot.is_scoring else budget
            if not slot.is_reading or most_tokens <= 0:
                continue
            if _must_repeat(slot.job.request):
                most_tokens = MOST_SCORED_TOKENS if slot.is_scoring else self._options.batch_tokens
            parts.append(self._part(slot, most_tokens))
            budget -= len(parts[-1].token_ids)
            scored -= len(parts[-1].token_ids) if slot.is_scoring else 0
        return parts

    def _part(self, slot: _Slot, most_tokens: int) -> _Part:
        if not self._model.reads_in_pieces:
            # What is scored takes a row of logits for each token, too many for all of a long prompt.
            first = most_tokens if slot.is_scoring else slot.pending_count
            most_tokens = 1 if slot.computed else first
        return _Part(slot, slot.token_ids[slot.computed : slot.computed + most_tokens])

    def _make_room(self, tokens: int) -> bool:
        """See that the caches hold so many more tokens; False: somebody lost his, so plan again."""
        left = self._options.cache_tokens - self._busy_tokens() - tokens
        self._kept.shrink(max(0, left))
        if left >= 0:
            return True
        self._preempt_youngest()
        return False

    def _busy_tokens(self) -> int:
        return sum(slot.computed for slot in list(self._slots))

    def _preempt_youngest(self) -> None:
        """The last to start waits, and goes on when there is room."""
        youngest = self._slots[-1]
        if len(self._slots) == 1:
            self._finish(
                youngest, GallamaError("The cache is too small for this request; raise `cache_size`.")
            )
            return
        self._slots.remove(youngest)
        youngest.cache, youngest.computed = self._model.new_cache(), 0
        self._preempted.appendleft(youngest)  # the others there are younger still
        self._room_was_freed = False

    def _use_logits(self, slot: _Slot, logits: torch.Tensor, mask_row: int | None) -> None:
        """Do what a slot's logits were computed for: score its prompt, then write its answer.

        Args:
            logits: shape (rows, vocabulary size), of the last tokens that were computed.
            mask_row: its row in this step's masks; None: it is not so far yet.
        """
        if slot.is_scoring:
            self._score_prompt(slot, logits)
        if mask_row is not None and not slot.has_ended:
            self._choose(slot, logits[-1], mask_row)

    def _score_prompt(self, slot: _Slot, logits: torch.Tensor) -> None:
        """Note the log probabilities of prompt tokens; each is foretold by the logits before it."""
        wanted = slot.job.request.logprobs
        assert wanted is not None, "prompt_logprobs goes with logprobs"
        for place, row in enumerate(logits.cpu().numpy(), slot.computed - len(logits) + 1):
            # After it lost its cache, it computes again what was scored before.
            if slot.is_scoring and place == len(slot.prompt_logprobs):
                slot.prompt_logprobs.append(log_probabilities(row, slot.token_ids[place], wanted))
        self._begin_answer(slot)

    def _begin_answer(self, slot: _Slot) -> None:
        """Tell that the slot has started, unless its prompt is to be scored first."""
        if slot.is_scoring:
            return
        cached = 0 if slot.prompt_logprobs else slot.computed
        self._tell(slot.job, Started(cached, tuple(slot.prompt_logprobs)))
        if slot.room <= 0:
            self._finish(slot, Ended("length"))

    def _choose(self, slot: _Slot, logits: torch.Tensor, mask_row: int) -> None:
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
        logprobs = () if wanted is None else (log_probabilities(logits.cpu().numpy(), token, wanted),)
        self._extend(slot, TokensAdded((token,), were_forced=False, logprobs=logprobs))
        if not slot.has_ended:
            self._append_forced(slot)

    def _append_forced(self, slot: _Slot) -> None:
        """Take what the grammar leaves no choice about: it needs no sampling, only a place in a step."""
        request = slot.job.request
        if request.state is None or request.logprobs is not None:
            return
        forced = request.state.forced()[: slot.room]
        if forced:
            _advance(request.state, forced)
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
        if slot.has_ended:
            return
        self._tell(slot.job, update)
        self._free(slot)

    def _free(self, slot: _Slot) -> None:
        slot.has_ended = True
        if slot in self._preempted:
            self._preempted.remove(slot)
            return
        self._slots.remove(slot)
        self._room_was_freed = True
        if self._model.can_fork and slot.computed:
            self._kept.keep(ComputedText(slot.token_ids[: slot.computed], slot.cache))

    def _take_cores(self) -> None:
        """Compute on as many cores as the workers beside this one leave it."""
        self._cores.begin_work()
        threads = self._cores.threads()
        if threads != self._threads:
            self._threads = threads
            torch.set_num_threads(threads)

    def _compute_for_nobody(self) -> None:
        """Compute a token while there is nothing else to do."""
        self._take_cores()
        piece = Piece(self._model.new_cache(), [self._options.probe_token_id], rows=1)
        if not torch.isfinite(self._model.compute([piece])[0].max()):  # -inf: a token it never says
            raise GallamaError("it computes no numbers")
        self._outbox.totals.steps += 1

    def _guard(self, action: Callable[[], None], fail: Callable[[GallamaError], None]) -> None:
        """Keep one job's error from the others. Rust panics are BaseExceptions, too."""
        try:
            action()
        except GallamaError as error:
            fail(error)
        except BaseException as error:
            logger.exception("an answer broke")
            fail(_as_told(error))

    def _start_over(self, error: GallamaError) -> None:
        """Give up what is under way, and all that was computed; what waits is not touched."""
        for slot in (*self._slots, *self._preempted):
            self._finish(slot, error)
        self._kept.clear()  # a step that broke may have left half of itself in a cache

    def _tell(self, job: Job, update: Update) -> None:
        self._outbox.tell(job, update)


def _as_told(error: BaseException) -> GallamaError:
    """What a client is told of something that broke; the log has it in full."""
    # PyTorch has no class of its own for too little memory beside the GPU.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return NotEnoughMemory("There is too little memory to compute this answer any further.")
    return GallamaError("The answer could not be generated any further.")


def _must_repeat(request: GenerationRequest) -> bool:
    """Whether the client wants the same answer again, by its seed.

    What is computed in other pieces differs in the last bits, enough to tip a sampled token now and then. So
    such a text is computed as a whole, in the same pieces, whoever else is at work.
    """
    return request.sampling.seed is not None and request.sampling.temperature != 0


def _advance(state: State, token_ids: list[int]) -> None:
    """Let a grammar take tokens that it has allowed; it refuses them only when it runs out of its limits."""
    if state.advance(token_ids) != len(token_ids):
        raise ConstraintFailed("The constraint engine gave up in the middle of the answer.")
