"""Keeps one instance of a model running: starts it, asks it for signs of life, and starts it again.

unloaded --wake--> starting --> ready --died or hung--> restarting --> ready
                      |                                     |
                      +----> failed <-----------------------+     a wake after the delay tries again

    any of them --unload--> stopping --> unloaded

A worker that computes shows it by its count of steps. One that has nothing to compute is asked for a token:
its process, its event loop and its engine must all be at work for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gallama.catalog import ResolvedModel
from gallama.config import ServerConfig
from gallama.errors import (
    CrashLoop,
    ErrorReport,
    GallamaError,
    ModelLoadFailed,
    ReportedError,
    WorkerDied,
    WorkerUnavailable,
)
from gallama.pool.launchers import Launcher, RunningWorker
from gallama.pool.views import InstanceState
from gallama.wire import WorkerStatus, ask_for_token, ask_status

if TYPE_CHECKING:
    from gallama.pool.gpus import Placement

logger = logging.getLogger(__name__)

_EXIT_NOTICE_SECONDS = 1.0
_REFRESH_SECONDS = 0.5
# Before its first word a worker imports its engine's libraries, from a cold disk maybe.
_SILENT_LOAD_SECONDS = 60.0
# One step over a long prompt may take minutes where a large model has only processors. As long as the process
# computes at least for this part of the time, it is given so many times as long to end a step.
_COMPUTING_PART = 0.2
_PATIENCE_WITH_COMPUTING = 5
# Of the gateway, not of the worker that it could not reach.
_OWN_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionLimits:
    """As in `ServerSettings`."""

    probe_interval_seconds: float = 15.0
    hang_seconds: float = 60.0

    @classmethod
    def of(cls, config: ServerConfig) -> SupervisionLimits:
        return cls(probe_interval_seconds=config.probe_interval_seconds, hang_seconds=config.hang_seconds)


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


class CrashCounter:
    """Tells a worker that dies as soon as it runs from one that dies now and then."""

    MOST_SHORT_RUNS = 5
    """So many in a row are a crash loop."""
    SHORT_RUN_SECONDS = 10.0
    PAUSE_SECONDS = 60.0
    """How long a crash loop is left alone before a request may try again."""

    def __init__(self) -> None:
        self._short_runs = 0
        self._first_at = 0.0

    def count(self, model_name: str, ran_seconds: float, how: str) -> None:
        """Count the end of a run.

        Raises:
            CrashLoop: it was one too many. Each short run after that is, until there was a longer one.
        """
        if ran_seconds >= self.SHORT_RUN_SECONDS:
            self._short_runs = 0
            return
        if self._short_runs == 0:
            self._first_at = time.monotonic() - ran_seconds
        self._short_runs += 1
        if self._short_runs >= self.MOST_SHORT_RUNS:
            raise CrashLoop(
                f"The worker of {model_name} came to an end {self._short_runs} times within"
                f" {time.monotonic() - self._first_at:.0f} s; the last time it {how}. It is not started again"
                f" for {self.PAUSE_SECONDS:g} s.",
                retry_after_seconds=self.PAUSE_SECONDS,
            )


async def _anywhere(_: ResolvedModel) -> Placement | None:
    return None


class Supervisor:
    """Runs one instance. Every change of its state is told to `on_change`, at once."""

    def __init__(
        self,
        model: ResolvedModel,
        launcher: Launcher,
        on_change: Callable[[], None],
        *,
        limits: SupervisionLimits = SupervisionLimits(),
        is_busy: Callable[[], bool] = lambda: False,
        place: Callable[[ResolvedModel], Awaitable[Placement | None]] = _anywhere,
        label: str = "",
    ) -> None:
        """
        Args:
            label: what the log calls it, where its model's name is not enough.
            is_busy: whether a request is with the worker now.
            place: chooses its GPUs, at each start; what it raises is why the start has failed.
        """
        self.state: InstanceState = "unloaded"
        """Never queued or draining: a supervisor knows nothing of other models, nor of requests."""
        self.endpoint: Endpoint | None = None
        """Set while it is ready."""
        self.problem: ErrorReport | None = None
        """Why the last start failed, or how the last worker died."""
        self.progress = 0.0
        """The part of the model that is loaded; 1 once it is ready."""
        self.starts = 0
        """How often a process was started."""
        self.ready_since: float | None = None
        """Seconds since 1970 at which the process that runs became ready."""
        self.status: WorkerStatus | None = None
        """What the process that runs last said of itself."""
        self.memory_bytes = 0
        """Resident memory of the process that runs and of its children, when it was last asked."""
        self.gpus: tuple[int, ...] = ()
        """The indexes of the GPUs that the process uses; () also where its engine chooses."""
        self.settled = asyncio.Event()
        """Set once the first start has succeeded or failed, or was given up."""
        self._model = model
        self._label = label or model.name
        self._launcher = launcher
        self._on_change = on_change
        self._limits = limits
        self._is_busy = is_busy
        self._place = place
        self._backoff = Backoff()
        self._crashes = CrashCounter()
        self._worker: RunningWorker | None = None
        self._alive_at = 0.0
        """When the worker was last known to be at work, or to have none; by `time.monotonic()`."""
        self._wanted = asyncio.Event()
        self._suspected = asyncio.Event()
        self._unloaded = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        """All that happens between a wake and the failure or unload that ends it."""
        self._may_start_at = 0.0

    @property
    def process_id(self) -> int | None:
        return None if self._worker is None else self._worker.process_id

    @property
    def may_start(self) -> bool:
        """Whether a wake would load the model."""
        return self.state in ("unloaded", "failed") and time.monotonic() >= self._may_start_at

    def wake(self) -> None:
        """Load the model if it is not loaded; after a failed start only when the delay is over.

        Does nothing while it is stopping; `on_change` tells when that is over.
        """
        if self.may_start:
            self._change("starting")
            self._wanted.set()

    def suspect(self, endpoint: Endpoint) -> None:
        """Give the worker no requests until it has shown that it lives: a connection to it broke."""
        if endpoint is self.endpoint:
            self._change("restarting")
            self._suspected.set()

    async def refresh(self) -> None:
        """Have `status` and `memory_bytes` of this moment, if the worker tells them at once."""
        worker, endpoint = self._worker, self.endpoint
        if worker is None or endpoint is None:
            return
        try:
            async with asyncio.timeout(_REFRESH_SECONDS):
                status = await ask_status(endpoint.address, endpoint.secret)
        except (TimeoutError, OSError):
            return
        memory_bytes = await asyncio.to_thread(worker.memory_bytes)
        if self.endpoint is endpoint:
            self.status, self.memory_bytes = status, memory_bytes

    async def unload(self) -> int:
        """End the process, whatever it is doing; the next wake loads the model anew.

        If this is cancelled, the process is ended all the same.

        Returns:
            The resident bytes that the process had; 0 where there was none.
        """
        memory_bytes = 0 if self._worker is None else self._worker.memory_bytes()
        self._backoff, self._crashes, self._may_start_at = Backoff(), CrashCounter(), 0.0
        self._wanted.clear()
        if self._life is None:
            self._change("unloaded")
        else:
            self._end_life(self._life)
            await self._unloaded.wait()
        return memory_bytes

    async def run(self) -> None:
        """Supervise until cancelled; then the worker is stopped."""
        while True:
            await self._wanted.wait()
            if self._wanted.is_set():  # else it was unloaded before it began
                self._wanted.clear()
                await self._until_life_ended(asyncio.create_task(self._live()))

    async def _until_life_ended(self, life: asyncio.Task[None]) -> None:
        self._life = life
        try:
            await asyncio.wait({life})
        except asyncio.CancelledError:
            self._end_life(life)
            await _until_done(life)
            raise
        finally:
            self._life = None
            if self.state == "stopping":
                self._change("unloaded")

    def _end_life(self, life: asyncio.Task[None]) -> None:
        # Cancelled a second time, it would not wait for the process to end.
        if self.state != "stopping":
            self._change("stopping")
            life.cancel()

    async def _live(self) -> None:
        try:
            await self._keep_running()
        except CrashLoop as error:
            self._fail(error, CrashCounter.PAUSE_SECONDS)
        except GallamaError as error:
            self._fail(error, self._backoff.next_delay(0))
        except Exception:
            # Only a bug comes here; without this its requests would wait for ever.
            logger.exception("The supervisor of %s failed.", self._label)
            unavailable = WorkerUnavailable(f"{self._model.name} cannot be started.")
            self._fail(unavailable, self._backoff.next_delay(0))

    def _fail(self, error: GallamaError, delay: float) -> None:
        self._may_start_at = time.monotonic() + delay
        logger.error("%s is not running: %s", self._label, error.message)
        self._change("failed", error.report())

    async def _keep_running(self) -> None:
        """Start the worker, again and again.

        Raises:
            CrashLoop: it died too often.
            GallamaError: it could not load the model.
        """
        while True:
            async with self._launched() as worker:
                endpoint = await self._loaded(worker)
                started = self._alive_at = time.monotonic()
                how = await self._until_dead(worker, endpoint)
                died = WorkerDied(f"The worker of {self._model.name} {how}.")
                self._change("restarting", died.report())
            ran_seconds = self._alive_at - started
            self._crashes.count(self._model.name, ran_seconds, how)
            delay = self._backoff.next_delay(ran_seconds)
            logger.error("The worker of %s %s; it starts again in %.1f s.", self._label, how, delay)
            await asyncio.sleep(delay)

    @contextlib.asynccontextmanager
    async def _launched(self) -> AsyncIterator[RunningWorker]:
        placement = await self._place(self._model)
        self._worker = await self._launcher.launch(self._model, placement)
        self.starts += 1
        self.gpus = () if placement is None else placement.gpus
        try:
            yield self._worker
        finally:
            try:
                await self._worker.stop()
            finally:
                self._worker, self.status, self.ready_since = None, None, None
                self.progress, self.memory_bytes, self.gpus = 0.0, 0, ()

    async def _loaded(self, worker: RunningWorker) -> Endpoint:
        """Where the worker answers, once it has loaded the model.

        Raises:
            GallamaError: the worker's own reason why it could not, or that it says nothing any more.
        """
        most_seconds = max(self._limits.hang_seconds, _SILENT_LOAD_SECONDS)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(most_seconds) as limit:

                def hear(progress: float) -> None:
                    self.progress = progress
                    limit.reschedule(loop.time() + most_seconds)

                ready = await worker.ready(hear)
        except TimeoutError as error:
            raise ModelLoadFailed(
                f"{self._model.name}: the worker has said nothing for {most_seconds:g} s while it loaded."
            ) from error
        endpoint = Endpoint(address=ready.address, secret=worker.secret, context_length=ready.context_length)
        self.progress, self.ready_since = 1.0, time.time()
        self.memory_bytes = worker.memory_bytes()
        self._change("ready", endpoint=endpoint)
        logger.info("%s is ready, with a context of %d tokens.", self._label, endpoint.context_length)
        return endpoint

    async def _until_dead(self, worker: RunningWorker, endpoint: Endpoint) -> str:
        """How the worker ended, or how it shows that it has hung."""
        exited = asyncio.create_task(worker.exited())
        hung = asyncio.create_task(self._until_hung(worker, endpoint))
        try:
            await asyncio.wait({exited, hung}, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                self._alive_at = time.monotonic()
                return exited.result()
            return hung.result()
        finally:
            exited.cancel()
            hung.cancel()
            await asyncio.gather(exited, hung, return_exceptions=True)

    async def _until_hung(self, worker: RunningWorker, endpoint: Endpoint) -> str:
        """Ask for a sign of life at each interval, until there is none; says what is wrong."""
        last = WorkerStatus(busy_slots=0, waiting=0, cached_tokens=0)
        while True:
            await self._next_check()
            try:
                status = await self._sign_of_life(endpoint, last.steps)
            except TimeoutError as error:
                return str(error)
            except ReportedError as error:
                return f"could not compute a token ({error.message})"
            except OSError as error:
                if error.errno not in _OWN_SHORTAGES:
                    return f"cannot be reached ({error})"
                logger.warning("The worker of %s cannot be asked how it is: %s", self._label, error)
                continue
            self.status = status
            self.memory_bytes = await asyncio.to_thread(worker.memory_bytes)
            stuck_seconds = time.monotonic() - self._alive_at
            if status.steps != last.steps or not _must_make_progress(status):
                last, self._alive_at = status, time.monotonic()
            elif stuck_seconds >= self._limits.hang_seconds * patience(last, status, stuck_seconds):
                return f"made no progress with its requests for {stuck_seconds:.0f} s"
            if self.state == "restarting":  # it was suspected; one that is being ended stays so
                self._change("ready", endpoint=endpoint)

    async def _next_check(self) -> None:
        interval = min(self._limits.probe_interval_seconds, self._limits.hang_seconds)
        with contextlib.suppress(TimeoutError):
            # Before Python 3.12 `asyncio.wait_for` loses a cancellation that comes with what it waits for.
            async with asyncio.timeout(interval):
                await self._suspected.wait()
            # Most often it has died, and its exit is noticed in a moment.
            await asyncio.sleep(_EXIT_NOTICE_SECONDS)
        self._suspected.clear()

    async def _sign_of_life(self, endpoint: Endpoint, steps: int) -> WorkerStatus:
        """The worker's status, after a token where it has computed nothing since it had done `steps` steps.

        Raises:
            TimeoutError: there is none; the message says of what.
            ReportedError: the engine cannot compute any more.
            OSError: the worker cannot be reached, or hung up.
        """
        hang_seconds = self._limits.hang_seconds
        try:
            async with asyncio.timeout(hang_seconds):
                status = await ask_status(endpoint.address, endpoint.secret)
        except TimeoutError:
            raise TimeoutError(f"did not tell its status within {hang_seconds:g} s") from None
        is_idle = not (status.busy_slots or status.waiting or self._is_busy())
        if not is_idle or status.steps != steps:
            return status
        try:
            async with asyncio.timeout(hang_seconds):
                return await ask_for_token(endpoint.address, endpoint.secret)
        except TimeoutError:
            raise TimeoutError(f"did not compute a token within {hang_seconds:g} s") from None

    def _change(
        self,
        state: InstanceState,
        problem: ErrorReport | None = None,
        *,
        endpoint: Endpoint | None = None,
    ) -> None:
        self.state, self.problem, self.endpoint = state, problem, endpoint
        if state in ("ready", "failed", "unloaded"):
            self.settled.set()
        if state == "unloaded":
            self._unloaded.set()
        else:
            self._unloaded.clear()
        self._on_change()


async def _until_done(task: asyncio.Task[None]) -> None:
    """Wait for a task that is ending; to be cancelled meanwhile makes it hurry, and ends no wait."""
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()


def patience(last: WorkerStatus, now: WorkerStatus, seconds: float) -> int:
    """How many times as long as others a worker has that ended no step for so many seconds.

    Args:
        last: what it said of itself at the beginning of that time.
    """
    computed_seconds = now.processor_seconds - last.processor_seconds
    return _PATIENCE_WITH_COMPUTING if computed_seconds >= _COMPUTING_PART * seconds else 1


def _must_make_progress(status: WorkerStatus) -> bool:
    """Whether the engine has an answer to work on that nobody but itself holds up."""
    return status.busy_slots + status.waiting > status.slow_readers
