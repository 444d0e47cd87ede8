"""The scheduler over a model of a few lines, so exact that every answer can be computed beforehand."""

from __future__ import annotations

import queue
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.engines.answer_streams import DraftChecked, Ended, Job, Started, TokensAdded, Update
from gallama.engines.llama_cpp.context import SequenceCache
from gallama.engines.llama_cpp.scheduler import (
    LEAST_PROMPT_TOKENS,
    WORTH_WAITING_TOKENS,
    Scheduler,
    SchedulerOptions,
    even_shares,
)
from gallama.engines.llama_cpp.speculation import Draft, Drafter, Kind, NgramDrafter, Wish
from gallama.engines.processor_cores import Cores, OwnCores, SharedCores
from gallama.errors import ConstraintFailed, GallamaError, WorkerUnavailable
from gallama.generation import EndReason, GenerationRequest, SamplingSettings, State, StateStatus
from tests.engines.llama_cpp.memory_kv import MemoryKv
from tests.engines.llama_cpp.step_costs import LongStepsForNothing

SIZE = 40
END = 39
GREEDY = SamplingSettings(temperature=0)
WITHOUT_END = SamplingSettings(temperature=0, logit_bias={END: -1e6})
ENDLESS = 10**9
SECONDS = 20


def logits_after(token_ids: Sequence[int]) -> NDArray[np.float32]:
    """A model: what comes next depends on every token and its place."""
    state = 1
    for token in token_ids:
        state = (state * 31 + token + 7) % 1_000_003
    return np.array([(state * (token + 3)) % 1009 for token in range(SIZE)], dtype=np.float32)


class Runs:
    """A grammar that forces a run of tokens after each few free ones, and ends after the last run."""

    def __init__(self, runs: Sequence[Sequence[int]], *, free: int = 2) -> None:
        self._runs = runs
        self._free = free
        self._choices = free
        self._place = (0, 0)

    @property
    def status(self) -> StateStatus:
        return "must_end" if self._place[0] == len(self._runs) else "running"

    def mask(self, out: NDArray[np.int32]) -> bool:
        assert not self.forced(), "what is forced needs no mask"
        out[:] = -1
        out[1] &= ~(1 << (END - 32))
        return True

    def accepts(self, token_ids: Sequence[int]) -> int:
        raise NotImplementedError

    def advance(self, token_ids: Sequence[int]) -> int:
        for token in token_ids:
            if self._choices:
                self._choices -= 1
                continue
            run, index = self._place
            assert token == self._runs[run][index]
            if index + 1 < len(self._runs[run]):
                self._place = run, index + 1
            else:
                self._place, self._choices = (run + 1, 0), self._free
        return len(token_ids)

    def forced(self) -> list[int]:
        run, index = self._place
        return [] if self._choices else list(self._runs[run][index:])

    def rollback(self, count: int) -> None:
        raise NotImplementedError

    def clone(self) -> State:
        raise NotImplementedError


class Broken(Runs):
    """A grammar that fails at its first mask."""

    def __init__(self, error: BaseException) -> None:
        super().__init__([[1]])
        self._error = error

    def mask(self, out: NDArray[np.int32]) -> bool:
        raise self._error


class Exhausted(Runs):
    """A grammar that refuses what it has forced or allowed: it ran out of its limits."""

    def advance(self, token_ids: Sequence[int]) -> int:
        return 0


class Board:
    """A scheduler, and what it has said of each job."""

    def __init__(
        self,
        *,
        cells: int = ENDLESS,
        slots: int = 4,
        batch_tokens: int = 64,
        drafter: Drafter | None = None,
        cores: Cores | None = None,
        shares_cells: bool = True,
        can_forget_partly: bool = True,
        **more_options: Any,
    ) -> None:
        self.threads: list[int] = []
        """Each number of threads that it was told to compute with."""
        self.kv = MemoryKv(
            cells, model=logits_after, shares_cells=shares_cells, can_forget_partly=can_forget_partly
        )
        sequences = slots + 3 if shares_cells else slots
        self.cache = SequenceCache(
            self.kv, sequences=sequences, can_forget_partly=can_forget_partly, shelf_tokens=100
        )
        options = SchedulerOptions(
            slots=slots,
            batch_tokens=batch_tokens,
            vocabulary_size=SIZE,
            context_length=1000,
            end_token_ids=frozenset({END}),
            probe_token_id=END,
            draft_tokens=8,
            **more_options,
        )
        self._inbox: queue.SimpleQueue[Sequence[tuple[Job, Update]]] = queue.SimpleQueue()
        self.scheduler = Scheduler(
            self.cache,
            options,
            self._inbox.put,
            cores=cores or OwnCores(1),
            set_threads=self.threads.append,
            drafter=drafter,
        )
        if drafter is not None:
            self.scheduler._cost = LongStepsForNothing()
        self._updates: dict[Job, list[Update]] = {}

    def submit(self, request: GenerationRequest) -> Job:
        job = Job(request)
        self._updates[job] = []
        self.scheduler.submit(job)
        return job

    def updates(self, job: Job) -> list[Update]:
        """Everything that is said of a job, once it has ended."""
        while not any(isinstance(update, Ended | GallamaError) for update in self._updates[job]):
            self.listen()
        return self._updates[job]

    def listen(self) -> None:
        for job, update in self._inbox.get(timeout=SECONDS):
            self._updates[job].append(update)

    def cached_prompt_tokens(self, job: Job) -> int:
        started = self.updates(job)[0]
        assert isinstance(started, Started)
        return started.cached_prompt_tokens

    def wait_for_tokens(self, job: Job) -> None:
        while not self.said_so_far(job):
            self.listen()

    def answer(self, job: Job) -> tuple[list[int], EndReason]:
        *added, end = self.updates(job)
        assert isinstance(added.pop(0), Started)
        assert isinstance(end, Ended), end
        return _tokens(added), end.reason

    def said_so_far(self, job: Job) -> list[int]:
        return _tokens(self._updates[job])

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + SECONDS
        while self.scheduler.status().busy_slots or self.scheduler.status().waiting:
            assert time.monotonic() < deadline, self.scheduler.status()
            time.sleep(0.001)


def _tokens(updates: Sequence[Update]) -> list[int]:
    return [token for update in updates if isinstance(update, TokensAdded) for token in update.token_ids]


@pytest.fixture
def board() -> Iterator[Board]:
    yield from _running(Board())


def _running(board: Board) -> Iterator[Board]:
    board.scheduler.start(warm_up=lambda: None)
    yield board
    board.scheduler.close()


def request(prompt: Sequence[int], *, max_tokens: int = 10, **fields: Any) -> GenerationRequest:
    fields.setdefault("sampling", GREEDY)
    return GenerationRequest(prompt_token_ids=prompt, max_tokens=max_tokens, **fields)


def expected_answer(
    prompt: Sequence[int], max_tokens: int, runs: Sequence[Sequence[int]] = (), free: int = 2
) -> tuple[list[int], EndReason]:
    """What the toy model says, worked out token by token."""
    state = Runs(runs, free=free) if runs else None
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        logits = logits_after(tokens)
        if state is not None:
            logits[END] = -1
        forced = [] if state is None else state.forced()
        token = forced[0] if forced else int(logits.argmax())
        if token == END:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
        if state is not None:
            state.advance([token])
            if state.status == "must_end":
                return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


def test_an_answer_is_what_the_model_says(board: Board) -> None:
    for length in range(1, 30):
        prompt = list(range(length))
        assert board.answer(board.submit(request(prompt))) == expected_answer(prompt, 10)


def test_forced_runs_stand_between_what_is_chosen(board: Board) -> None:
    runs = [[1, 2, 3], list(range(30)), [5]]
    job = board.submit(request([1, 2], max_tokens=100, state=Runs(runs)))
    assert board.answer(job) == expected_answer([1, 2], 100, runs)
    added = [update for update in board.updates(job) if isinstance(update, TokensAdded)]
    assert [list(update.token_ids) for update in added if update.were_forced] == runs


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_a_limit_holds_also_in_the_middle_of_a_forced_run(board: Board, max_tokens: int) -> None:
    job = board.submit(request([1, 2], max_tokens=max_tokens, state=Runs([[1, 2, 3], [4, 5, 6, 7]])))
    answer, _ = board.answer(job)
    assert answer == expected_answer([1, 2], max_tokens, [[1, 2, 3], [4, 5, 6, 7]])[0]
    assert len(answer) == min(max_tokens, 11)


def test_an_answer_that_is_forced_as_a_whole_needs_no_computation(board: Board) -> None:
    job = board.submit(request([1, 2], state=Runs([[1, 2, 3]], free=0)))
    assert board.answer(job) == ([1, 2, 3], "stop")
    assert board.kv.batches == []


def test_what_is_forced_behind_a_prompt_is_read_with_it(board: Board) -> None:
    state = Runs([[1, 2, 3], [4]])
    state._choices = 0  # the first run comes at once
    answer, end = board.answer(board.submit(request([5, 6], state=state)))
    assert (answer[:3], len(answer), end) == ([1, 2, 3], 6, "stop")
    assert [len(batch) for batch in board.kv.batches] == [2 + 3, 1], "and the last run is not computed at all"


@pytest.mark.parametrize(("cells", "shares_cells"), [(70, True), (120, True), (ENDLESS, True), (70, False)])
@pytest.mark.parametrize("batch_tokens", [8, 64])
def test_answers_do_not_depend_on_company_cancellations_or_room(
    cells: int, shares_cells: bool, batch_tokens: int
) -> None:
    """Many random jobs, some of them given up, in a cache that may be far too small for all."""
    rng = random.Random(cells + batch_tokens)
    for _ in range(4):
        for board in _running(Board(cells=cells, batch_tokens=batch_tokens, shares_cells=shares_cells)):
            _run_random_jobs(board, rng)
            board.wait_until_idle()
            assert not any(sequence.is_busy for sequence in board.cache._sequences)


def _run_random_jobs(board: Board, rng: random.Random) -> None:
    stems = [[rng.randrange(SIZE) for _ in range(30)] for _ in range(3)]
    expected: dict[Job, tuple[list[int], EndReason]] = {}
    given_up: set[Job] = set()
    for _ in range(30):
        prompt = [*rng.choice(stems)[: rng.randrange(1, 30)], rng.randrange(SIZE)]
        max_tokens = rng.randrange(1, 30)
        runs = [[rng.randrange(38)] * rng.randrange(1, 12) for _ in range(rng.randrange(4))]
        state = Runs(runs) if runs else None
        job = board.submit(request(prompt, max_tokens=max_tokens, state=state))
        expected[job] = expected_answer(prompt, max_tokens, runs)
        if rng.random() < 0.3:
            given_up.add(job)
            board.scheduler.cancel(rng.choice(list(given_up)))
        kept = [other for other in expected if other not in given_up]
        if kept and rng.random() < 0.3:
            board.answer(rng.choice(kept))
    for job in given_up:
        board.scheduler.cancel(job)
    for job, answer in expected.items():
        if job not in given_up:
            assert board.answer(job) == answer
    for job in given_up:
        said = board.said_so_far(job)
        assert said == expected[job][0][: len(said)]


def test_more_jobs_than_slots_wait_in_line() -> None:
    for board in _running(Board(slots=1)):
        jobs = [board.submit(request([number, 1])) for number in range(5)]
        board.answer(jobs[4])
        ended = [job for job in board._updates if isinstance(board._updates[job][-1], Ended)]
        assert ended == jobs


def test_a_prompt_that_another_job_reads_is_read_once(board: Board) -> None:
    prompt = [token % 38 for token in range(400)]
    jobs = [board.submit(request([*prompt, number], max_tokens=1)) for number in range(3)]
    for number, job in enumerate(jobs):
        assert board.answer(job) == expected_answer([*prompt, number], 1)
    nearly_nothing = 2 * WORTH_WAITING_TOKENS
    assert board.kv.computed_tokens <= len(prompt) + nearly_nothing
    assert min(board.cached_prompt_tokens(job) for job in jobs[1:]) >= len(prompt) - nearly_nothing


@pytest.mark.parametrize("sampling", [GREEDY, SamplingSettings(temperature=0.1, seed=7)])
@pytest.mark.parametrize("runs", [[], [[1, 2, 3]]])
def test_who_waits_with_the_same_prompt_starts_where_it_ends(
    sampling: SamplingSettings, runs: list[list[int]]
) -> None:
    prompt = [token % 38 for token in range(100)]
    board = Board()
    jobs = []
    for _ in range(3):
        state = Runs(runs, free=0) if runs else None
        jobs.append(board.submit(request(prompt, max_tokens=4, sampling=sampling, state=state)))
    for _ in _running(board):
        assert len({tuple(board.answer(job)[0]) for job in jobs}) == 1
        assert board.kv.computed_tokens == (0 if runs else len(prompt) + 3 * 3)
        assert [board.cached_prompt_tokens(job) for job in jobs[1:]] == ([0, 0] if runs else [100, 100])


def test_a_model_that_sums_up_its_text_answers_the_same_prompt_twice() -> None:
    prompt = [token % 38 for token in range(100)]
    board = Board(can_forget_partly=False)
    jobs = [board.submit(request(prompt)) for _ in range(3)]
    for _ in _running(board):
        assert [board.answer(job) for job in jobs] == [expected_answer(prompt, 10)] * 3


def test_a_sequence_that_cannot_be_kept_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    board = Board(cells=100)

    def no_memory(sequence: int) -> NDArray[np.uint8]:
        raise MemoryError

    board.kv.save = no_memory  # type: ignore[method-assign]
    for _ in _running(board):
        for first in range(8):
            prompt = [first, *range(30)]
            assert board.answer(board.submit(request(prompt))) == expected_answer(prompt, 10)
        assert "could not be kept" in caplog.text


def test_nothing_of_a_failed_computation_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    board = Board(step_seconds=1000.0, batch_tokens=600)
    long = [token % 38 for token in range(550)]
    for _ in _running(board):
        jobs = [board.submit(request([n, *long], max_tokens=ENDLESS, sampling=WITHOUT_END)) for n in range(2)]
        for job in jobs:
            board.wait_for_tokens(job)
        board.kv.is_broken = True
        for job in jobs:
            assert isinstance(board.updates(job)[-1], GallamaError)
        assert board.cache.shelved_tokens == 0


def test_choices_of_one_prompt_go_their_own_ways_behind_it(board: Board) -> None:
    prompt = [token % 38 for token in range(50)]
    lengths = [20, 3, 11, 1]
    jobs = [board.submit(request(prompt, max_tokens=length, sampling=WITHOUT_END)) for length in lengths]
    answers = [board.answer(job)[0] for job in jobs]
    assert list(map(len, answers)) == lengths
    assert all(answer == answers[0][: len(answer)] for answer in answers)
    assert board.kv.computed_tokens == len(prompt) + sum(length - 1 for length in lengths)


@pytest.mark.parametrize(
    ("pending", "sequences", "shares"),
    [
        ([], [], []),
        ([1, 1, 1], [2, 0, 1], [1, 1, 1]),
        ([5], [0], [5]),
        ([1, 6], [0, 1], [1, 6]),
        ([1, 1, 1, 1, 1, 1, 1, 6], range(8), [1] * 8),
        ([1, 1, 1, 1, 1, 1, 1, 9], range(8), [1] * 7 + [9]),
        ([1, 1, 1, 1, 1, 1, 2, 8], range(8), [1] * 8),
        ([1, 1, 1, 1, 1, 1, 5, 9], range(8), [1] * 6 + [5] * 2),
        ([1, 1, 1, 1, 1, 1, 5, 9], [7, 1, 2, 3, 4, 5, 6, 0], [1] * 7 + [9]),
        ([2, 2, 2, 3, 7, 7], range(6), [2, 2, 2, 2, 7, 7]),
    ],
)
def test_sequences_with_cells_of_their_own_get_few_different_shares(
    pending: list[int], sequences: Sequence[int], shares: list[int]
) -> None:
    assert even_shares(pending, sequences) == shares


def test_sequences_with_cells_of_their_own_stand_side_by_side_in_a_batch() -> None:
    board = Board(shares_cells=False, slots=4)
    jobs = [board.submit(request([number, 1], max_tokens=5 + number)) for number in range(10)]
    for _ in _running(board):
        for job in jobs:
            board.answer(job)
        assert all(batch == sorted(batch) for batch in board.kv.batches)
        assert max(len(set(batch)) for batch in board.kv.batches) == 4


def test_a_long_prompt_is_read_in_pieces_while_others_write() -> None:
    board = Board(batch_tokens=200, step_seconds=0.0)
    board.submit(request([7], max_tokens=100, sampling=WITHOUT_END))
    reader = board.submit(request([3] * 1000, max_tokens=1))
    for _ in _running(board):
        board.answer(reader)
        first, *shared_batches = [batch for batch in board.kv.batches if len(set(batch)) == 2]
        assert len(first) == 200, "nobody writes yet, so the batch is filled"
        assert max(map(len, shared_batches)) <= LEAST_PROMPT_TOKENS + 1, "no time, so the least"


def test_everybody_writes_on_where_others_fill_the_batch_with_forced_runs() -> None:
    board = Board(slots=4, batch_tokens=8)
    eager = [board.submit(request([n], max_tokens=400, state=Runs([[1] * 100] * 3))) for n in range(3)]
    modest = board.submit(request([9], max_tokens=20, sampling=WITHOUT_END))
    for _ in _running(board):
        board.answer(modest)
        assert all(3 in batch for batch in board.kv.batches[:20]), "each step brings a token"
        for job in eager:
            board.answer(job)


@pytest.mark.parametrize(
    "error", [ConstraintFailed("too deep"), ZeroDivisionError("a bug"), BaseException("a Rust panic")]
)
def test_a_grammar_that_breaks_ends_only_its_own_answer(
    board: Board, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    others = [board.submit(request([number, 2])) for number in range(2)]
    broken = board.submit(request([5], state=Broken(error)))
    end = board.updates(broken)[-1]
    assert isinstance(end, GallamaError)
    assert isinstance(end, ConstraintFailed) == isinstance(error, ConstraintFailed)
    assert "bug" not in end.message, "the client hears nothing of our insides"
    for number, job in enumerate(others):
        assert board.answer(job) == expected_answer([number, 2], 10)
    board.wait_until_idle()


@pytest.mark.parametrize("free", [0, 1])
def test_a_grammar_that_runs_out_of_its_limits_fails_as_such(board: Board, free: int) -> None:
    job = board.submit(request([1], state=Exhausted([[1, 2]], free=free)))
    assert isinstance(board.updates(job)[-1], ConstraintFailed)
    board.wait_until_idle()


def test_a_job_that_cannot_start_hears_of_it_and_nobody_else_does(board: Board) -> None:
    nonsense = SamplingSettings(logit_bias={1: "much"})  # type: ignore[dict-item]
    other = board.submit(request([1], max_tokens=30))
    broken = board.submit(request([2], sampling=nonsense))
    assert isinstance(board.updates(broken)[-1], GallamaError)
    assert board.answer(other) == expected_answer([1], 30)
    assert board.answer(board.submit(request([3]))) == expected_answer([3], 10)
    board.wait_until_idle()


def test_a_failed_computation_ends_what_is_under_way_and_the_next_job_works(
    board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    job = board.submit(request([1], max_tokens=ENDLESS, sampling=WITHOUT_END))
    board.wait_for_tokens(job)
    board.kv.is_broken = True
    assert isinstance(board.updates(job)[-1], GallamaError)
    board.kv.is_broken = False
    assert board.answer(board.submit(request([1]))) == expected_answer([1], 10)


def test_a_sequence_that_does_not_fit_the_cache_alone_ends_in_an_error() -> None:
    for board in _running(Board(cells=20)):
        end = board.updates(board.submit(request([1], max_tokens=50, sampling=WITHOUT_END)))[-1]
        assert isinstance(end, GallamaError)
        assert "cache_size" in end.message


def test_jobs_under_way_waiting_and_unseen_hear_that_the_model_goes() -> None:
    board = Board(slots=1)
    board.scheduler.start(warm_up=lambda: None)
    running = board.submit(request([1], max_tokens=ENDLESS, sampling=WITHOUT_END))
    board.wait_for_tokens(running)
    others = [board.submit(request([2])) for _ in range(50)]
    board.scheduler.close()
    for job in (running, *others):
        assert isinstance(board.updates(job)[-1], WorkerUnavailable)


def test_what_repeats_by_its_seed_reuses_nothing_of_others() -> None:
    prompt = [token % 38 for token in range(100)]
    seeded = SamplingSettings(temperature=1, seed=7)
    for board in _running(Board(slots=1)):
        jobs = [board.submit(request(prompt, sampling=sampling)) for sampling in (GREEDY, seeded, seeded)]
        assert board.answer(jobs[1]) == board.answer(jobs[2])
        again = board.submit(request(prompt, sampling=seeded))
        assert board.answer(again) == board.answer(jobs[1])
        # The third waited with the second's prompt, which was read alone, and is as good as read anew.
        assert [board.cached_prompt_tokens(job) for job in (*jobs, again)] == [0, 0, 100, 0]


class Oracle:
    """Knows the model, and lies now and then."""

    def __init__(self, seed: int, *, lies: float) -> None:
        self._rng = random.Random(seed)
        self._lies = lies
        self.forgotten: list[Any] = []

    seconds_per_token = 0.0

    def draft(self, wishes: Sequence[Wish]) -> list[Draft]:
        return [Draft(self._draft(wish), Kind(16)) for wish in wishes]

    def _draft(self, wish: Wish) -> list[int]:
        text = wish.token_ids.copy()
        for _ in range(self._rng.randrange(wish.most_tokens + 1)):
            is_lie = self._rng.random() < self._lies
            text.append(self._rng.randrange(38) if is_lie else int(logits_after(text)[:38].argmax()))
        return text[len(wish.token_ids) :]

    def forget(self, key: Any) -> None:
        self.forgotten.append(key)

    def set_threads(self, threads: int) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize("lies", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("cells", "shares_cells"), [(70, True), (120, True), (ENDLESS, True), (70, False)])
def test_answers_do_not_depend_on_what_is_guessed(cells: int, shares_cells: bool, lies: float) -> None:
    rng = random.Random(cells)
    for round in range(3):
        drafter = Oracle(round, lies=lies)
        for board in _running(
            Board(cells=cells, batch_tokens=16, drafter=drafter, shares_cells=shares_cells)
        ):
            _run_random_jobs(board, rng)
            board.wait_until_idle()
            assert not any(sequence.is_busy for sequence in board.cache._sequences)
            status = board.scheduler.status()
            assert 0 <= status.accepted_draft_tokens <= status.drafted_tokens
            assert status.accepted_draft_tokens > 0 or lies == 1.0


def test_what_is_guessed_right_saves_steps() -> None:
    def steps(drafter: Drafter | None) -> int:
        for board in _running(Board(drafter=drafter)):
            job = board.submit(request([3, 4], max_tokens=60, sampling=WITHOUT_END))
            assert board.answer(job)[1] == "length"
        return len(board.kv.batches)

    assert steps(None) == 60
    assert steps(Oracle(0, lies=0.0)) <= 30
    assert steps(NgramDrafter([])) <= 60


def test_each_job_hears_what_became_of_the_guesses_made_for_it() -> None:
    for board in _running(Board(drafter=Oracle(0, lies=0.3))):
        jobs = [board.submit(request([number], max_tokens=30)) for number in range(6)]
        checked = [
            update for job in jobs for update in board.updates(job) if isinstance(update, DraftChecked)
        ]
        board.wait_until_idle()
        status = board.scheduler.status()
        assert sum(update.drafted_tokens for update in checked) == status.drafted_tokens > 0
        assert sum(update.accepted_tokens for update in checked) == status.accepted_draft_tokens > 0


def test_the_drafter_forgets_whoever_ends() -> None:
    drafter = Oracle(0, lies=0.5)
    for board in _running(Board(drafter=drafter)):
        jobs = [board.submit(request([number], max_tokens=20)) for number in range(6)]
        board.scheduler.cancel(board.submit(request([9], max_tokens=ENDLESS, sampling=WITHOUT_END)))
        for job in jobs:
            board.answer(job)
        board.wait_until_idle()
    assert len(set(map(id, drafter.forgotten))) >= len(jobs)


def test_without_jumping_forward_the_answer_is_the_same_and_each_token_costs_a_step() -> None:
    answers, steps = [], []
    for jump_forward in (True, False):
        for board in _running(Board(jump_forward=jump_forward)):
            state = Choosable([[1, 2, 3], [4] * 20])
            job = board.submit(request([1, 2], max_tokens=100, state=state))
            answers.append(board.answer(job))
            steps.append(len(board.kv.batches))
    assert answers[0] == answers[1]
    assert steps[1] > steps[0] + 15


class Choosable(Runs):
    """Runs whose tokens can also be chosen: the mask allows just the one."""

    def mask(self, out: NDArray[np.int32]) -> bool:
        forced = self.forced()
        if not forced:
            return super().mask(out)
        out[:] = 0
        out[forced[0] // 32] = 1 << forced[0] % 32
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="workers share cores on Linux only")
def test_cores_are_shared_from_the_first_computation_on_while_another_worker_is_busy(tmp_path: Path) -> None:
    other = SharedCores(8, tmp_path)
    other.begin_work()
    board = Board(cores=SharedCores(8, tmp_path))
    threads_at_start: list[int] = []
    board.scheduler.start(warm_up=lambda: threads_at_start.extend(board.threads))
    board.answer(board.submit(request([1, 2])))
    assert threads_at_start == board.threads == [4]
    other.end_work()
    board.answer(board.submit(request([1, 2])))
    assert board.threads == [4, 8]
    board.scheduler.close()


@pytest.mark.skipif(sys.platform != "linux", reason="workers share cores on Linux only")
def test_a_worker_that_has_nothing_to_do_leaves_all_cores_to_the_others(tmp_path: Path) -> None:
    other = SharedCores(8, tmp_path)
    other.begin_work()
    board = Board(cores=SharedCores(8, tmp_path))
    board.scheduler.start(warm_up=lambda: None)
    job = board.submit(request([1, 2], max_tokens=ENDLESS, sampling=WITHOUT_END))
    board.wait_for_tokens(job)
    assert other.threads() == 4
    board.scheduler.cancel(job)
    deadline = time.monotonic() + SECONDS
    while other.threads() < 8:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    board.scheduler.close()
    other.end_work()


@pytest.mark.skipif(sys.platform != "linux", reason="workers share cores on Linux only")
@pytest.mark.parametrize("fails_to_warm_up", [False, True])
def test_a_worker_that_has_ended_leaves_all_cores_to_the_others(
    tmp_path: Path, fails_to_warm_up: bool
) -> None:
    def break_down() -> None:
        raise ZeroDivisionError

    other = SharedCores(8, tmp_path)
    other.begin_work()
    board = Board(cores=SharedCores(8, tmp_path))
    if fails_to_warm_up:
        with pytest.raises(ZeroDivisionError):
            board.scheduler.start(warm_up=break_down)
    else:
        board.scheduler.start(warm_up=lambda: None)
        board.wait_for_tokens(board.submit(request([1], max_tokens=ENDLESS, sampling=WITHOUT_END)))
    board.scheduler.close()
    assert other.threads() == 8
    other.end_work()


class Breaking(Oracle):
    """Breaks when it is asked, or when it is to forget."""

    def __init__(self, *, forgets: bool) -> None:
        super().__init__(0, lies=0.0)
        self._forgets = forgets

    def draft(self, wishes: Sequence[Wish]) -> list[Draft]:
        if not self._forgets:
            raise MemoryError
        return super().draft(wishes)

    def forget(self, key: Any) -> None:
        raise MemoryError


@pytest.mark.parametrize("forgets", [True, False])
def test_a_drafter_that_breaks_costs_nobody_an_answer(
    forgets: bool, caplog: pytest.LogCaptureFixture
) -> None:
    board = Board(drafter=Breaking(forgets=forgets))
    jobs = [board.submit(request([number], max_tokens=20)) for number in range(6)]
    for _ in _running(board):
        for number, job in enumerate(jobs):
            assert board.answer(job) == expected_answer([number], 20)
        board.wait_until_idle()
    assert "the drafter broke" in caplog.text


def test_nothing_is_guessed_for_what_must_repeat() -> None:
    board = Board(drafter=Oracle(0, lies=0.0))
    seeded = SamplingSettings(temperature=0.1, seed=7, logit_bias={END: -1e6})
    job = board.submit(request([1, 2], max_tokens=30, sampling=seeded))
    for _ in _running(board):
        assert board.answer(job)[1] == "length"
        assert board.scheduler.status().drafted_tokens == 0
