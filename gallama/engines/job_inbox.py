"""How others reach the one thread that computes: with jobs, and with probes of whether it still can."""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from gallama.engines.answer_streams import Job
from gallama.errors import GallamaError

logger = logging.getLogger(__name__)


class JobInbox:
    """`submit`, `probe`, `wake` and `len` are for any thread; the rest is for the one that computes."""

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        """Jobs that have come and have no slot yet, in order."""
        self._messages: queue.SimpleQueue[Job | Future[None] | None] = queue.SimpleQueue()
        self._probes: list[Future[None]] = []

    def __len__(self) -> int:
        """Jobs without a slot, those on their way included."""
        return len(self.waiting) + self._messages.qsize()

    def submit(self, job: Job) -> None:
        self._messages.put(job)

    def probe(self) -> Future[None]:
        """Done once something was computed; fails with what went wrong."""
        probe: Future[None] = Future()
        self._messages.put(probe)
        return probe

    def wake(self) -> None:
        """Make a `receive` that sleeps return."""
        self._messages.put(None)

    def receive(self, *, may_sleep: bool) -> None:
        """Take what has come; with `may_sleep`, wait for something."""
        while may_sleep or not self._messages.empty():
            message = self._messages.get()
            may_sleep = False
            if isinstance(message, Future):
                self._probes.append(message)
            elif message is not None:
                self.waiting.append(message)

    def drop_cancelled(self) -> None:
        self.waiting = deque(job for job in self.waiting if not job.cancelled)

    def answer_probes(self, compute: Callable[[], None] | None) -> None:
        """
        Args:
            compute: computes a token for nobody; None: something was computed anyway.
        """
        probes, self._probes = self._probes, []
        for probe in probes:
            _answer(probe, None if compute is None else _what_breaks(compute))

    def refuse_probes(self, error: GallamaError) -> None:
        for probe in self._probes:
            _answer(probe, error)


def _what_breaks(compute: Callable[[], None]) -> BaseException | None:
    try:
        compute()
    except BaseException as error:  # Rust panics are BaseExceptions, too
        logger.exception("a token for nobody could not be computed")
        return error
    return None


def _answer(probe: Future[None], error: BaseException | None) -> None:
    if not probe.set_running_or_notify_cancel():
        return  # nobody waits any more
    if error is None:
        probe.set_result(None)
    else:
        probe.set_exception(GallamaError(f"The model cannot be computed: {error}"))
