"""One thread that turns the texts of many calls into vectors, a batch of them at a time.

Each step takes texts of the calls in turn, one of each before a second of any, until the batch is full. So a
call with one text is done with the next step or two, whatever others have sent.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gallama.engines.processor_cores import Cores
from gallama.errors import GallamaError, WorkerUnavailable
from gallama.generation import EngineStatus

logger = logging.getLogger(__name__)

TokenIds = Sequence[int]


class Computer(Protocol):
    passes: int
    """Forward passes so far."""

    def compute(self, texts: Sequence[TokenIds]) -> NDArray[np.float32]:
        """One row for each text."""
        ...


@dataclass(slots=True, eq=False)
class _Call:
    """Texts that somebody waits for. Cancelling `rows` drops what is not yet computed of them."""

    texts: Sequence[TokenIds]
    rows: Future[NDArray[np.float32]] = field(default_factory=Future)
    computed: list[NDArray[np.float32]] = field(default_factory=list)
    taken: int = 0
    """How many texts have been put into a batch."""

    @property
    def next_text(self) -> TokenIds:
        return self.texts[self.taken]

    @property
    def has_more(self) -> bool:
        return self.taken < len(self.texts)

    def answer(self, rows: NDArray[np.float32]) -> None:
        if self.rows.set_running_or_notify_cancel():
            self.rows.set_result(rows)

    def fail(self, error: GallamaError) -> None:
        if self.rows.set_running_or_notify_cancel():
            self.rows.set_exception(error)


class TextBatches:
    """Computes the texts of calls, side by side. Its public methods may be called from any thread."""

    def __init__(
        self,
        computer: Computer,
        *,
        batch_tokens: int,
        batch_texts: int,
        cores: Cores,
        set_threads: Callable[[int], None],
    ) -> None:
        """
        Args:
            batch_tokens: at most in a batch, unless one text alone has more.
            batch_texts: at most in a batch.
            set_threads: called with how many threads are to compute, whenever that changes.
        """
        self._computer = computer
        self._batch_tokens = batch_tokens
        self._batch_texts = batch_texts
        self._cores = cores
        self._set_threads = set_threads
        self._threads = cores.threads()
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._open: set[_Call] = set()
        """Calls that are not answered."""
        self._turns: deque[_Call] = deque()
        """Those of them with texts that are not taken, in the order of their turns."""
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="llama-embedder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, texts: Sequence[TokenIds]) -> Future[NDArray[np.float32]]:
        """The rows of texts, in their order; cancel it, and what is not yet computed never is.

        Args:
            texts: at least one, of at least one token each.
        """
        call = _Call(texts)
        self._inbox.put(call)
        return call.rows

    def status(self) -> EngineStatus:
        return EngineStatus(
            busy_slots=len(self._open),
            waiting=self._inbox.qsize(),
            cached_tokens=0,
            steps=self._computer.passes,
        )

    def close(self) -> None:
        """End after the step at hand; calls under way end in an error."""
        self._is_closing = True
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closing:
            self._receive()
            self._drop({call for call in self._open if call.rows.cancelled()})
            self._step()
        self._cores.end_work()
        self._receive()
        self._fail(set(self._open), WorkerUnavailable("The model is being unloaded."))

    def _receive(self) -> None:
        """Take new calls; with nothing to do, sleep until one comes."""
        may_sleep = not self._open and not self._is_closing
        if may_sleep:
            self._cores.end_work()
        while may_sleep or not self._inbox.empty():
            call = self._inbox.get()
            may_sleep = False
            if call is not None:
                self._open.add(call)
                self._turns.append(call)

    def _step(self) -> None:
        """Compute a batch, and answer the calls that are done with it."""
        batch = self._plan()
        if not batch:
            return
        try:
            self._take_cores()
            self._hand_out(batch, self._computer.compute([text for _, text in batch]))
        except BaseException:  # this thread must outlive every bug: nobody would answer any more
            logger.exception("a batch of %d texts broke", len(batch))
            error = GallamaError("The texts could not be computed; the worker's log says why.")
            self._fail({call for call, _ in batch} & self._open, error)

    def _hand_out(self, batch: Sequence[tuple[_Call, TokenIds]], rows: NDArray[np.float32]) -> None:
        assert len(rows) == len(batch), "else nobody knows whose they are"
        for (call, _), row in zip(batch, rows, strict=True):
            call.computed.append(row)
            if len(call.computed) == len(call.texts):
                answer = np.stack(call.computed)
                self._open.remove(call)
                call.answer(answer)

    def _plan(self) -> list[tuple[_Call, TokenIds]]:
        """The texts of the next batch. A call whose text does not fit any more is the first next time."""
        batch: list[tuple[_Call, TokenIds]] = []
        room = self._batch_tokens
        put_off: list[_Call] = []
        while self._turns and room > 0 and len(batch) < self._batch_texts:
            call = self._turns.popleft()
            text = call.next_text
            if batch and len(text) > room:
                put_off.append(call)
                continue
            batch.append((call, text))
            room -= len(text)
            call.taken += 1
            if call.has_more:
                self._turns.append(call)
        self._turns.extendleft(reversed(put_off))
        return batch

    def _take_cores(self) -> None:
        """Compute on as many cores as the workers beside this one leave it."""
        self._cores.begin_work()
        threads = self._cores.threads()
        if threads != self._threads:
            self._threads = threads
            self._set_threads(threads)

    def _drop(self, calls: set[_Call]) -> None:
        if calls:
            self._open -= calls
            self._turns = deque(call for call in self._turns if call not in calls)

    def _fail(self, calls: set[_Call], error: GallamaError) -> None:
        self._drop(calls)
        for call in calls:
            call.fail(error)
