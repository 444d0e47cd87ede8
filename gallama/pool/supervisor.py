"""Keeps one instance of a model running: starts it, probes it, and starts it again when it has died.

unloaded --wake--> starting --> ready --died--> restarting --> ready
                      |                             |
                      +----> failed <---------------+     a wake after the delay tries again
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

from gallama.catalog import ResolvedModel
from gallama.errors import ErrorReport, GallamaError, WorkerDied, WorkerUnavailable
from gallama.pool.launchers import Launcher, RunningWorker
from gallama.wire import ask_status

logger = logging.getLogger(__name__)

InstanceState = Literal["unloaded", "starting", "ready", "restarting", "failed"]

PROBE_INTERVAL_SECONDS = 15.0
PROBE_TIMEOUT_SECONDS = 60.0
"""A worker that does not tell its status for so long has hung, and is replaced."""
_EXIT_NOTICE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a running worker answers. Each run has one of its own."""

    address: str
    secret: str
    context_length: int


class Backoff:
    """How long to wait before the next start: twice as long each time, until a run was stable."""

    FIRST_SECONDS = 0.5
    LONGEST_SECONDS = 30.0
    STABLE_SECONDS = 60.0

    def __init__(self) -> None:
        self._next_seconds = self.FIRST_SECONDS

    def next_delay(self, ran_seconds: float) -> float:
        """The delay after a run of `ran_seconds`; 0 for a start that failed."""
        if ran_seconds >= self.STABLE_SECONDS:
            self._next_seconds = self.FIRST_SECONDS
        delay = self._next_seconds
        self._next_seconds = min(2 * delay, self.LONGEST_SECONDS)
        return delay


class Supervisor:
    """Runs one instance. Every change of its state is told to `on_change`, at once."""

    def __init__(self, model: ResolvedModel, launcher: Launcher, on_change: Callable[[], None]) -> None:
        self.state: InstanceState = "unloaded"
        self.endpoint: Endpoint | None = None
        """Set while it is ready."""
        self.problem: ErrorReport | None = None
        """Why the last start failed, or how the last worker died."""
        self.settled = asyncio.Event()
        """Set once the first start has succeeded or failed."""
        self._model = model
        self._launcher = launcher
        self._on_change = on_change
        self._backoff = Backoff()
        self._wanted = asyncio.Event()
        self._suspected = asyncio.Event()
        self._may_start_at = 0.0

    def wake(self) -> None:
        """Load the model if it is not loaded; after a failed start only when the delay is over."""
        if self.state in ("unloaded", "failed") and time.monotonic() >= self._may_start_at:
            self._change("starting")
            self._wanted.set()

    def suspect(self, endpoint: Endpoint) -> None:
        """Give the worker no requests until it has answered a probe: a connection to it broke."""
        if endpoint is self.endpoint:
            self._change("restarting")
            self._suspected.set()

    async def run(self) -> None:
        """Supervise until cancelled; then the worker is stopped."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._keep_running()
            except GallamaError as error:
                self._may_start_at = time.monotonic() + self._backoff.next_delay(0)
                logger.error("Loading %s failed: %s", self._model.name, error.message)
                self._change("failed", error.report())
            except Exception:
                # Only a bug comes here; without this its requests would wait for ever.
                logger.exception("The supervisor of %s failed.", self._model.name)
                self._change("failed", WorkerUnavailable(f"{self._model.name} cannot be started.").report())

    async def _keep_running(self) -> None:
        """Start the worker, again and again.

        Raises:
            GallamaError: it could not load the model.
        """
        while True:
            async with self._launched() as worker:
                endpoint = await _endpoint_of(worker)
                started = time.monotonic()
                self._change("ready", endpoint=endpoint)
                logger.info(
                    "%s is ready, with a context of %d tokens.", self._model.name, endpoint.context_length
                )
                how = await self._until_dead(worker, endpoint)
                self._change("restarting", WorkerDied(f"The worker of {self._model.name} {how}.").report())
            delay = self._backoff.next_delay(time.monotonic() - started)
            logger.error("The worker of %s %s; it starts again in %.1f s.", self._model.name, how, delay)
            await asyncio.sleep(delay)

    @contextlib.asynccontextmanager
    async def _launched(self) -> AsyncIterator[RunningWorker]:
        worker = await self._launcher.launch(self._model)
        try:
            yield worker
        finally:
            await worker.stop()

    async def _until_dead(self, worker: RunningWorker, endpoint: Endpoint) -> str:
        """How the worker ended, or that it answers no more."""
        exited = asyncio.create_task(worker.exited())
        hung = asyncio.create_task(self._until_unresponsive(endpoint))
        try:
            await asyncio.wait({exited, hung}, return_when=asyncio.FIRST_COMPLETED)
            return exited.result() if exited.done() else hung.result()
        finally:
            exited.cancel()
            hung.cancel()
            await asyncio.gather(exited, hung, return_exceptions=True)

    async def _until_unresponsive(self, endpoint: Endpoint) -> str:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._suspected.wait(), PROBE_INTERVAL_SECONDS)
                # Most often it has died, and its exit is noticed in a moment.
                await asyncio.sleep(_EXIT_NOTICE_SECONDS)
            self._suspected.clear()
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                    await ask_status(endpoint.address, endpoint.secret)
            except TimeoutError:
                return f"did not tell its status within {PROBE_TIMEOUT_SECONDS:.0f} s"
            except OSError as error:
                return f"cannot be reached ({error})"
            if self.state != "ready":
                self._change("ready", endpoint=endpoint)

    def _change(
        self,
        state: InstanceState,
        problem: ErrorReport | None = None,
        *,
        endpoint: Endpoint | None = None,
    ) -> None:
        self.state, self.problem, self.endpoint = state, problem, endpoint
        if state in ("ready", "failed"):
            self.settled.set()
        self._on_change()


async def _endpoint_of(worker: RunningWorker) -> Endpoint:
    ready = await worker.ready()
    return Endpoint(address=ready.address, secret=worker.secret, context_length=ready.context_length)
