"""The thread that drives a library's generator, over one that writes letters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from gallama.engines.answer_streams import Ended, Job, Started, TokensAdded, Update
from gallama.engines.generators.text import Text
from gallama.engines.generators.thread import GeneratorThread
from gallama.errors import GallamaError, ModelLoadFailed, NotEnoughMemory, WorkerUnavailable
from gallama.generation import GenerationRequest, SamplingSettings, Vocabulary

SLOTS = 3
LEG_TOKENS = 5
SECONDS = 20
"""No test waits so long unless it fails."""

POISON = 66
"""A prompt of this token breaks every step it is in."""
MISFIT = 67
"""A prompt of this token cannot be started."""


class Letters:
    """Goes on with the next letter of the alphabet, one in a step."""

    slots = SLOTS
    context_length = 1000

    def __init__(self) -> None:
        self.legs: list[Text] = []
        self.threads = {threading.current_thread().name}
        self.widths: list[int] = []
        self.rebuilds = 0
        self.breaks: list[BaseException] = []
        """Raised by the next steps, one each, of at least `breaking_width` texts."""
        self.breaking_width = 1
        self.cannot_rebuild = False
        self.cannot_count = False
        self.room = SLOTS
        self.is_closed = False
        self.gate = threading.Event()
        self.gate.set()

    def start(self, text: Text) -> bool:
        self._note()
        if text.token_ids[0] == MISFIT:
            raise NotEnoughMemory("It does not fit.")
        if len(self.legs) >= self.room:
            return False
        text.leg = len(text.token_ids) + LEG_TOKENS
        text.begin(0)
        self.legs.append(text)
        return True

    def cancel(self, text: Text) -> None:
        self._note()
        self.legs.remove(text)

    def step(self) -> None:
        self._note()
        assert self.gate.wait(SECONDS)
        self.widths.append(len(self.legs))
        for text in self.legs:
            if text.token_ids[0] == POISON:
                raise RuntimeError("CUDA error")
        if self.breaks and len(self.legs) >= self.breaking_width:
            raise self.breaks.pop(0)
        for text in list(self.legs):
            text.mask()
            text.take(letter_after(text.token_ids))
            if len(text.token_ids) == text.leg:
                self.legs.remove(text)
                text.end_leg()

    def rebuild(self) -> None:
        self._note()
        self.rebuilds += 1
        self.legs.clear()
        if self.cannot_rebuild:
            raise RuntimeError("CUDA error")

    def probe(self) -> None:
        self._note()
        if self.breaks:
            raise self.breaks.pop(0)

    def cached_tokens(self) -> int:
        if self.cannot_count:
            raise RuntimeError("a bug")
        return 7

    def close(self) -> None:
        self._note()
        self.is_closed = True

    def _note(self) -> None:
        self.threads.add(threading.current_thread().name)


def letter_after(token_ids: Sequence[int]) -> int:
    return ord("a") + (sum(token_ids) + len(token_ids)) % 26


def expected(first: int, count: int) -> list[int]:
    token_ids = [first]
    for _ in range(count):
        token_ids.append(letter_after(token_ids))
    return token_ids[1:]


class Reader:
    """Collects what the thread hands over."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._updates: dict[Job, list[Update]] = {}

    def sink(self, updates: Sequence[tuple[Job, Update]]) -> None:
        with self._changed:
            for job, update in updates:
                self._updates.setdefault(job, []).append(update)
            self._changed.notify_all()

    def of(self, job: Job) -> list[Update]:
        """All updates of a job, once it has ended."""
        return self._wait(job, lambda updates: isinstance(updates[-1], Ended | GallamaError))

    def begun(self, job: Job) -> list[Update]:
        return self._wait(job, lambda updates: any(isinstance(update, TokensAdded) for update in updates))

    def _wait(self, job: Job, is_so: Callable[[list[Update]], bool]) -> list[Update]:
        with self._changed:
            assert self._changed.wait_for(
                lambda: bool(self._updates.get(job)) and is_so(self._updates[job]), SECONDS
            )
            return list(self._updates[job])

    def tokens(self, job: Job) -> list[int]:
        return [
            token for update in self.of(job) if isinstance(update, TokensAdded) for token in update.token_ids
        ]


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def letters() -> list[Letters]:
    """The generator, once it is loaded."""
    return []


@pytest.fixture
def thread(reader: Reader, letters: list[Letters], byte_vocabulary: Vocabulary) -> Iterator[GeneratorThread]:
    def load() -> Letters:
        letters.append(Letters())
        return letters[0]

    thread = GeneratorThread(load, byte_vocabulary, reader.sink, name="letters")
    assert thread.start() == Letters.context_length
    yield thread
    letters[0].gate.set()
    thread.close()


def job_of(first: int, max_tokens: int = 12) -> Job:
    return Job(
        GenerationRequest(prompt_token_ids=[first], max_tokens=max_tokens, sampling=SamplingSettings())
    )


def submit(thread: GeneratorThread, *firsts: int, max_tokens: int = 12) -> list[Job]:
    jobs = [job_of(first, max_tokens) for first in firsts]
    for job in jobs:
        thread.submit(job)
    return jobs


def test_a_text_of_several_legs_is_written_as_one(thread: GeneratorThread, reader: Reader) -> None:
    (job,) = submit(thread, 1)
    assert LEG_TOKENS < 12
    assert reader.tokens(job) == expected(1, 12)
    assert reader.of(job)[0] == Started(0)
    assert reader.of(job)[-1] == Ended("length")


def test_more_texts_than_slots_are_all_written(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    jobs = submit(thread, *range(1, 10))
    for first, job in enumerate(jobs, 1):
        assert reader.tokens(job) == expected(first, 12)
    assert max(letters[0].widths) <= SLOTS


def test_without_room_texts_wait_and_nobody_overtakes(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    letters[0].room = 1
    jobs = submit(thread, 1, 2, 3)
    assert [reader.tokens(job) for job in jobs] == [expected(first, 12) for first in (1, 2, 3)]
    assert set(letters[0].widths) == {1}


def test_a_text_for_which_there_is_never_room_ends_in_an_error(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    letters[0].room = 0
    (job,) = submit(thread, 1)
    assert isinstance(reader.of(job)[-1], GallamaError)


def test_a_text_that_cannot_be_started_ends_alone(thread: GeneratorThread, reader: Reader) -> None:
    good, bad, other = submit(thread, 1, MISFIT, 2)
    assert isinstance(reader.of(bad)[-1], NotEnoughMemory)
    assert reader.tokens(good) == expected(1, 12)
    assert reader.tokens(other) == expected(2, 12)


def test_a_step_that_breaks_once_costs_no_answer(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    letters[0].breaking_width = 2
    letters[0].breaks.append(RuntimeError("CUDA error"))
    jobs = submit(thread, 1, 2, max_tokens=60)
    assert [reader.tokens(job) for job in jobs] == [expected(first, 60) for first in (1, 2)]
    assert letters[0].rebuilds == 1
    assert letters[0].breaks == []


def test_only_the_text_that_breaks_its_steps_ends_in_an_error(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    letters[0].gate.clear()
    good, bad, other = submit(thread, 1, POISON, 2)
    letters[0].gate.set()
    assert isinstance(reader.of(bad)[-1], GallamaError)
    assert reader.tokens(good) == expected(1, 12)
    assert reader.tokens(other) == expected(2, 12)


def test_too_little_memory_for_one_alone_is_told_as_that(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    letters[0].breaks.append(MemoryError())
    (job,) = submit(thread, 1)
    assert isinstance(reader.of(job)[-1], NotEnoughMemory)


def test_a_generator_that_cannot_be_made_anew_fails_all_and_its_probes(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    letters[0].cannot_rebuild = True
    letters[0].breaks.append(RuntimeError("CUDA error"))
    jobs = submit(thread, 1, 2)
    assert all(isinstance(reader.of(job)[-1], GallamaError) for job in jobs)
    (later,) = submit(thread, 3)
    assert isinstance(reader.of(later)[-1], GallamaError)
    with pytest.raises(GallamaError, match="loaded again"):
        thread.probe().result(SECONDS)


def test_each_answer_of_a_broken_generator_ends_in_an_error_of_its_own(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    letters[0].cannot_rebuild = True
    letters[0].breaks.append(RuntimeError("CUDA error"))
    reader.of(*submit(thread, 1))
    first, second = (reader.of(job)[-1] for job in submit(thread, 2, 3))
    assert isinstance(first, GallamaError)
    assert first is not second, "a reader leaves its frames in what it raises"


def test_tokens_that_cannot_be_counted_cost_no_answer(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    letters[0].cannot_count = True
    short, long = *submit(thread, 1, max_tokens=3), *submit(thread, 2, max_tokens=40)
    assert reader.tokens(short) == expected(1, 3)
    assert reader.tokens(long) == expected(2, 40)


def test_closing_a_generator_that_counts_no_tokens_tells_everybody(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    (job,) = submit(thread, 1, max_tokens=900)
    reader.begun(job)
    letters[0].cannot_count = True
    thread.close()
    assert isinstance(reader.of(job)[-1], WorkerUnavailable)
    assert letters[0].is_closed


def test_a_text_that_is_cancelled_leaves_its_slot_to_the_next(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    endless = submit(thread, 1, 2, 3, max_tokens=900)
    for job in endless:
        reader.begun(job)
    for job in endless:
        thread.cancel(job)
    (job,) = submit(thread, 4)
    assert reader.tokens(job) == expected(4, 12)
    assert letters[0].legs == []


def test_a_job_that_is_cancelled_while_it_waits_is_never_started(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    letters[0].gate.clear()
    first = submit(thread, 1, 2, 3)
    waiting, after = submit(thread, MISFIT, 4)
    thread.cancel(waiting)
    letters[0].gate.set()
    assert reader.tokens(after) == expected(4, 12)
    assert waiting not in reader._updates
    assert [reader.tokens(job) for job in first] == [expected(place, 12) for place in (1, 2, 3)]


def test_a_probe_computes_while_nothing_else_is(thread: GeneratorThread) -> None:
    steps = thread.status().steps
    thread.probe().result(SECONDS)
    assert thread.status().steps == steps + 1


def test_a_probe_tells_what_broke(thread: GeneratorThread, letters: list[Letters]) -> None:
    letters[0].breaks.append(RuntimeError("no numbers"))
    with pytest.raises(GallamaError, match="no numbers"):
        thread.probe().result(SECONDS)


def test_a_probe_of_a_thread_at_work_is_answered_by_its_steps(
    thread: GeneratorThread, reader: Reader
) -> None:
    (job,) = submit(thread, 1, max_tokens=900)
    reader.begun(job)
    thread.probe().result(SECONDS)
    thread.cancel(job)


def test_what_was_done_is_counted(thread: GeneratorThread, reader: Reader) -> None:
    (job,) = submit(thread, 1)
    reader.of(job)
    status = thread.status()
    assert (status.sampled_tokens, status.forced_tokens, status.steps) == (12, 0, 12)
    assert (status.busy_slots, status.waiting, status.cached_tokens) == (0, 0, 7)


def test_the_library_is_used_by_one_thread_alone(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    jobs = submit(thread, 1, 2)
    for job in jobs:
        reader.of(job)
    thread.probe().result(SECONDS)
    thread.close()
    assert letters[0].threads == {"letters"}


def test_closing_ends_answers_in_an_error_and_gives_memory_back(
    thread: GeneratorThread, reader: Reader, letters: list[Letters]
) -> None:
    jobs = submit(thread, *range(1, 6), max_tokens=900)
    reader.begun(jobs[0])
    thread.close()
    assert all(isinstance(reader.of(job)[-1], WorkerUnavailable) for job in jobs)
    assert letters[0].is_closed
    assert letters[0].legs == []


def test_what_loading_raises_is_raised_by_the_start(reader: Reader, byte_vocabulary: Vocabulary) -> None:
    def load() -> Letters:
        raise ModelLoadFailed("It is broken.")

    thread = GeneratorThread(load, byte_vocabulary, reader.sink, name="letters")
    with pytest.raises(ModelLoadFailed, match="broken"):
        thread.start()
    thread.close()
