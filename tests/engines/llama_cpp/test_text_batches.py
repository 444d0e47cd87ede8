"""Batches of texts of many calls, over a computer of a few lines that waits until it may go on."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future

import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.engines.llama_cpp.text_batches import TextBatches
from gallama.engines.processor_cores import OwnCores
from gallama.errors import GallamaError, WorkerUnavailable

BATCH_TOKENS = 10
BATCH_TEXTS = 4
BROKEN, WITHOUT_ROW = 666, 667
SECONDS = 10


class StepByStep:
    """Makes of each text its first token, once it is told to."""

    def __init__(self) -> None:
        self.passes = 0
        self.begun: queue.SimpleQueue[list[list[int]]] = queue.SimpleQueue()
        self._go_on: queue.SimpleQueue[None] = queue.SimpleQueue()

    def compute(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        self.passes += 1
        self.begun.put([list(text) for text in texts])
        self._go_on.get(timeout=SECONDS)
        if any(BROKEN in text for text in texts):
            raise RuntimeError("broken")
        return np.array([[text[0]] for text in texts if WITHOUT_ROW not in text], dtype=np.float32)

    def step(self) -> list[list[int]]:
        """Let the next batch be computed; which texts it has."""
        batch = self.begun.get(timeout=SECONDS)
        self._go_on.put(None)
        return batch

    def let_all_go_on(self) -> None:
        for _ in range(1000):
            self._go_on.put(None)


@pytest.fixture
def computer() -> StepByStep:
    return StepByStep()


@pytest.fixture
def batches(computer: StepByStep) -> Iterator[TextBatches]:
    batches = TextBatches(
        computer,
        batch_tokens=BATCH_TOKENS,
        batch_texts=BATCH_TEXTS,
        cores=OwnCores(1),
        set_threads=lambda _: None,
    )
    batches.start()
    yield batches
    computer.let_all_go_on()
    batches.close()


def hold(batches: TextBatches, computer: StepByStep) -> Future[NDArray[np.float32]]:
    """Have a text computed until somebody lets it go on, so that what comes now waits."""
    held = batches.submit([[999]])
    assert computer.begun.get(timeout=SECONDS) == [[999]]
    return held


def first_tokens(rows: Future[NDArray[np.float32]]) -> list[float]:
    return [float(row[0]) for row in rows.result(SECONDS)]


def test_rows_come_in_the_order_of_the_texts(batches: TextBatches, computer: StepByStep) -> None:
    computer.let_all_go_on()
    texts = [[index] * (1 + index % 9) for index in range(50)]
    assert first_tokens(batches.submit(texts)) == list(range(50))


def test_a_batch_has_no_more_texts_and_tokens_than_it_may(batches: TextBatches, computer: StepByStep) -> None:
    computer.let_all_go_on()
    calls = [batches.submit([[call] * (1 + (call + index) % 9) for index in range(9)]) for call in range(9)]
    for call, rows in enumerate(calls):
        assert first_tokens(rows) == [call] * 9
    seen = [computer.begun.get() for _ in range(computer.passes)]
    assert sum(map(len, seen)) == 81
    assert all(len(batch) <= BATCH_TEXTS and sum(map(len, batch)) <= BATCH_TOKENS for batch in seen)


def test_calls_share_a_batch(batches: TextBatches, computer: StepByStep) -> None:
    hold(batches, computer)
    calls = [batches.submit([[call]]) for call in range(4)]
    computer.let_all_go_on()
    assert [first_tokens(rows) for rows in calls] == [[0], [1], [2], [3]]
    assert computer.passes == 2


def test_a_call_with_one_text_is_done_with_the_next_batch_whatever_is_before_it(
    batches: TextBatches, computer: StepByStep
) -> None:
    held = hold(batches, computer)
    many = batches.submit([[index] for index in range(1, 500)])
    one = batches.submit([[1000]])
    computer._go_on.put(None)
    held.result(SECONDS)
    assert computer.step() == [[1], [1000], [2], [3]]
    assert first_tokens(one) == [1000]
    assert not many.done()


def test_what_did_not_fit_is_first_the_next_time(batches: TextBatches, computer: StepByStep) -> None:
    hold(batches, computer)
    for length, token in ((6, 1), (8, 2), (3, 3), (9, 4)):
        batches.submit([[token] * length])
    computer._go_on.put(None)
    assert [text[0] for text in computer.step()] == [1, 3]
    assert [text[0] for text in computer.step()] == [2]
    assert [text[0] for text in computer.step()] == [4]


def test_a_text_longer_than_a_batch_is_computed_alone(batches: TextBatches, computer: StepByStep) -> None:
    hold(batches, computer)
    long, short = batches.submit([[7] * 25]), batches.submit([[8]])
    computer._go_on.put(None)
    assert computer.step() == [[7] * 25]
    assert computer.step() == [[8]]
    assert (first_tokens(long), first_tokens(short)) == ([7], [8])


def test_a_cancelled_call_is_not_computed(batches: TextBatches, computer: StepByStep) -> None:
    hold(batches, computer)
    left = batches.submit([[1]] * 100)
    stays = batches.submit([[2]])
    assert left.cancel()
    computer._go_on.put(None)
    assert computer.step() == [[2]]
    assert first_tokens(stays) == [2]
    with pytest.raises(CancelledError):
        left.result()


def test_a_call_that_is_cancelled_half_way_frees_its_place(
    batches: TextBatches, computer: StepByStep
) -> None:
    left = batches.submit([[1]] * 100)
    assert computer.begun.get(timeout=SECONDS) == [[1]] * 4
    assert left.cancel()
    stays = batches.submit([[2]])
    computer._go_on.put(None)
    assert computer.step() == [[2]]
    assert first_tokens(stays) == [2]
    assert batches.status().busy_slots == 0


def test_a_batch_that_breaks_fails_its_calls_and_no_others(
    batches: TextBatches, computer: StepByStep
) -> None:
    hold(batches, computer)
    broken = [batches.submit([[BROKEN] * 5, [1], [2]]), batches.submit([[3] * 9])]
    computer.let_all_go_on()
    with pytest.raises(GallamaError, match="could not be computed"):
        broken[0].result(SECONDS)
    assert first_tokens(broken[1]) == [3]
    assert first_tokens(batches.submit([[4]])) == [4]


def test_a_batch_without_a_row_for_each_text_fails_its_calls_and_no_others(
    batches: TextBatches, computer: StepByStep
) -> None:
    hold(batches, computer)
    calls = [batches.submit([[1]]), batches.submit([[WITHOUT_ROW]]), batches.submit([[2]])]
    computer.let_all_go_on()
    for rows in calls:
        with pytest.raises(GallamaError, match="could not be computed"):
            rows.result(SECONDS)
    assert first_tokens(batches.submit([[4]])) == [4]


def test_the_status_counts_passes_and_open_calls(batches: TextBatches, computer: StepByStep) -> None:
    held = hold(batches, computer)
    assert (batches.status().steps, batches.status().busy_slots) == (1, 1)
    computer._go_on.put(None)
    held.result(SECONDS)
    second = batches.submit([[1]])
    computer.step()
    second.result(SECONDS)
    assert (batches.status().steps, batches.status().waiting) == (2, 0)


def test_closing_tells_those_who_wait() -> None:
    computer = StepByStep()
    batches = TextBatches(
        computer,
        batch_tokens=BATCH_TOKENS,
        batch_texts=BATCH_TEXTS,
        cores=OwnCores(1),
        set_threads=lambda _: None,
    )
    batches.start()
    calls = [hold(batches, computer), *(batches.submit([[1]] * 100) for _ in range(3))]
    batches._is_closing = True
    computer.let_all_go_on()
    batches.close()
    assert first_tokens(calls[0]) == [999]
    for rows in calls[1:]:
        with pytest.raises(WorkerUnavailable):
            rows.result(SECONDS)
