"""The instances of one model and the requests that wait for them.

All changes happen here, each in one synchronous step that ends in `_assign`: no decision is taken on what was
true before an await.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from gallama import __version__
from gallama.catalog import ResolvedModel
from gallama.conversation import ChatRequest
from gallama.errors import ReportedError, WorkerBusy, WorkerUnavailable
from gallama.pool.launchers import Launcher
from gallama.pool.routing import InstanceLoad, RoutingPolicy
from gallama.pool.supervisor import Endpoint, InstanceState, Supervisor

_COMING: frozenset[InstanceState] = frozenset({"ready", "starting", "restarting"})
_MAX_RETRY_AFTER_SECONDS = 600
_SERVICE_TIME_WEIGHT = 0.2


@dataclass(slots=True)
class Instance:
    """One process that holds the model, or will."""

    supervisor: Supervisor
    capacity: int
    busy: int = 0
    served: int = 0

    @property
    def has_room(self) -> bool:
        return self.supervisor.state == "ready" and self.busy < self.capacity


@dataclass(frozen=True, slots=True)
class Slot:
    """The right to ask an instance one request."""

    instance: Instance
    endpoint: Endpoint

    def report_broken(self) -> None:
        """A connection to the worker broke: others are not to be sent there before it is known to live."""
        self.instance.supervisor.suspect(self.endpoint)


@dataclass(slots=True, eq=False)
class _Waiting:
    request: ChatRequest
    slot: asyncio.Future[Slot] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class ModelQueue:
    """One model: its instances, and a line of requests, first come first served."""

    def __init__(self, models: Sequence[ResolvedModel], launcher: Launcher, policy: RoutingPolicy) -> None:
        """`models`: one entry for each instance; they share their name."""
        self.model = models[0]
        self.created = int(time.time())
        identity = f"{__version__}\n{self.model.path}\n{self.model.spec.model_dump_json()}"
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10]
        self._policy = policy
        self._instances = [
            Instance(Supervisor(model, launcher, self._state_changed), model.spec.max_concurrent_requests)
            for model in models
        ]
        self._queue_limit = sum(model.spec.queue_limit for model in models)
        self._waiting: deque[_Waiting] = deque()
        self._service_seconds = 1.0

    @property
    def supervisors(self) -> list[Supervisor]:
        return [instance.supervisor for instance in self._instances]

    @property
    def states(self) -> list[InstanceState]:
        return [supervisor.state for supervisor in self.supervisors]

    @property
    def is_ready(self) -> bool:
        return "ready" in self.states

    @property
    def is_loaded(self) -> bool:
        """Whether it was ever asked to load."""
        return any(state != "unloaded" for state in self.states)

    @property
    def problem(self) -> str:
        """Why it is not ready; "" when nothing went wrong."""
        problems = [supervisor.problem for supervisor in self.supervisors if supervisor.problem is not None]
        return problems[0].message if problems else ""

    @property
    def busy(self) -> int:
        return sum(instance.busy for instance in self._instances)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def wake(self) -> None:
        """Load what is not loaded, as far as failed starts allow it now."""
        for supervisor in self.supervisors:
            supervisor.wake()

    @contextlib.asynccontextmanager
    async def slot(self, request: ChatRequest, *, in_front: bool = False) -> AsyncIterator[Slot]:
        """Wait for room, and hold it inside the context. Cancelling leaves the line.

        Args:
            in_front: for a request that had waited before and lost its worker.

        Raises:
            WorkerBusy: the line is full.
            WorkerUnavailable, or the worker's own error: no instance lives or is about to.
        """
        waiting = self._enter(request, in_front=in_front)
        try:
            slot = await waiting.slot
        except asyncio.CancelledError:
            self._abandon(waiting)
            raise
        began = time.monotonic()
        try:
            yield slot
        finally:
            self._release(slot.instance, time.monotonic() - began)

    def _enter(self, request: ChatRequest, *, in_front: bool) -> _Waiting:
        self.wake()
        if not self._may_become_ready():
            raise self._unavailable()
        if not in_front and self.busy + self.waiting >= self._coming_slots() + self._queue_limit:
            raise self._too_busy()
        waiting = _Waiting(request)
        enter: Callable[[_Waiting], None] = self._waiting.appendleft if in_front else self._waiting.append
        enter(waiting)
        self._assign()
        return waiting

    def _abandon(self, waiting: _Waiting) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)
        elif waiting.slot.done() and not waiting.slot.cancelled() and waiting.slot.exception() is None:
            # It got its slot in the very moment in which its client left.
            self._release(waiting.slot.result().instance, None)

    def _release(self, instance: Instance, service_seconds: float | None) -> None:
        instance.busy -= 1
        if service_seconds is not None:
            self._service_seconds += _SERVICE_TIME_WEIGHT * (service_seconds - self._service_seconds)
        self._assign()

    def _state_changed(self) -> None:
        if not self._may_become_ready():
            while self._waiting:
                waiting = self._waiting.popleft()
                if not waiting.slot.done():
                    waiting.slot.set_exception(self._unavailable())
        self._assign()

    def _assign(self) -> None:
        """Give free slots to those who wait, in their order."""
        while self._waiting and (free := [i for i, each in enumerate(self._instances) if each.has_room]):
            waiting = self._waiting.popleft()
            if waiting.slot.done():
                continue
            instance = self._instances[self._policy(self._loads(free), waiting.request).index]
            assert instance.supervisor.endpoint is not None
            instance.busy += 1
            instance.served += 1
            waiting.slot.set_result(Slot(instance, instance.supervisor.endpoint))

    def _loads(self, indexes: Sequence[int]) -> list[InstanceLoad]:
        return [
            InstanceLoad(index=i, busy=self._instances[i].busy, served=self._instances[i].served)
            for i in indexes
        ]

    def _may_become_ready(self) -> bool:
        return self._coming_slots() > 0

    def _coming_slots(self) -> int:
        """The slots of all instances that live or are about to."""
        return sum(each.capacity for each in self._instances if each.supervisor.state in _COMING)

    def _unavailable(self) -> ReportedError | WorkerUnavailable:
        for supervisor in self.supervisors:
            if supervisor.problem is not None:
                return ReportedError(supervisor.problem)
        return WorkerUnavailable(f"No instance of {self.model.name} is running.")

    def _too_busy(self) -> WorkerBusy:
        seconds = math.ceil(self._service_seconds * (self.waiting + 1) / self._coming_slots())
        return WorkerBusy(
            f"{self.model.name} answers {self.busy} requests and {self.waiting} wait, as many as may; "
            f"try again in about {seconds} s.",
            retry_after_seconds=min(max(seconds, 1), _MAX_RETRY_AFTER_SECONDS),
        )
