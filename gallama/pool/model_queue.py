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
from gallama.errors import (
    DeadlineExceeded,
    GallamaError,
    ModelUnloaded,
    ReportedError,
    WorkerBusy,
    WorkerUnavailable,
)
from gallama.pool.instance import Instance
from gallama.pool.routing import RoutingPolicy
from gallama.pool.supervisor import Endpoint
from gallama.pool.ticket import Ticket
from gallama.pool.views import InstanceState, ServedModel, Unloaded
from gallama.pool.work import Work

_MAX_RETRY_AFTER_SECONDS = 600
_SERVICE_TIME_WEIGHT = 0.2
_UNLOADING_RETRY_SECONDS = 1.0


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
    work: Work
    slot: asyncio.Future[Slot] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class ModelQueue:
    """One model: its instances, and a line of requests, first come first served."""

    def __init__(
        self,
        model: ResolvedModel,
        policy: RoutingPolicy,
        *,
        ask_for_load: Callable[[ModelQueue], None],
        on_change: Callable[[], None],
    ) -> None:
        """
        Args:
            model: what is told of it while it has no instance.
            ask_for_load: called by a request that finds nothing loaded. It sets `is_queued`, or raises what
                the request is to hear.
            on_change: called after each change that may allow or ask for another.
        """
        self.created = int(time.time())
        self._show(model)
        self.instances: list[Instance] = []
        self.is_queued = False
        """It waits for room beside other models."""
        self.is_yielding = False
        """Others wait for its place: it ends what it has begun, and begins nothing."""
        self.is_closing = False
        """It is being taken away: nobody may wait for it."""
        self.is_leaving = False
        """Its processes are being ended to make room; who comes now waits for its return."""
        self.last_used: float | None = None
        """Seconds since 1970."""
        self._loads = self._load_failures = self._restarts = 0
        self._policy = policy
        self._ask_for_load = ask_for_load
        self._on_change = on_change
        self._waiting: deque[_Waiting] = deque()
        self._waiting_tokens = 0
        self._service_seconds = 1.0

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def is_loaded(self) -> bool:
        """Whether a process of it takes memory, or is about to."""
        return any(instance.has_process for instance in self.instances)

    @property
    def is_wanted(self) -> bool:
        """Whether it is loaded, or was to be."""
        return self.is_queued or any(each.supervisor.state != "unloaded" for each in self.instances)

    @property
    def is_settled(self) -> bool:
        """Whether no instance of it is on its way up or down."""
        return all(each.supervisor.state in ("ready", "failed", "unloaded") for each in self.instances)

    @property
    def is_idle(self) -> bool:
        """Whether unloading it would hurt nobody, but those who know that they must wait."""
        return self.busy == 0 and (self.is_yielding or not self._waiting)

    @property
    def may_leave(self) -> bool:
        """Whether it may have to make room for another model."""
        return not (self.model.spec.pinned or self.is_leaving or self.is_closing) and self.is_settled

    @property
    def ready_since(self) -> float:
        """When the last of its instances became ready, in seconds since 1970; 0 where none is."""
        return max((each.supervisor.ready_since or 0.0 for each in self.instances), default=0.0)

    @property
    def busy(self) -> int:
        return sum(instance.busy for instance in self.instances)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _show(self, model: ResolvedModel) -> None:
        self.model = model
        identity = f"{__version__}\n{model.path}\n{model.spec.model_dump_json()}"
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10]

    def add(self, instance: Instance) -> None:
        if not self.instances:
            self._show(instance.model)
        self.instances.append(instance)

    def take_away(self, instance: Instance) -> None:
        """It has no process any more, and is not to have one."""
        self.instances.remove(instance)
        self.changed()

    def count(self, instance: Instance) -> None:
        """Take note of a change of an instance's state."""
        match instance.supervisor.state:
            case "ready":
                self._loads += instance.has_loaded_anew()
            case "failed":
                self._load_failures += 1
            case "restarting":
                self._restarts += instance.supervisor.problem is not None

    def wake(self) -> None:
        """Load what is not loaded, as far as failed starts allow it now."""
        for instance in self.instances:
            instance.wake()
        self.changed()  # where none may start now, those who wait hear why

    def stay(self) -> None:
        """Nobody waits for its place any more."""
        self.is_yielding = False
        self._assign()

    async def unload(self, drain_seconds: float) -> list[Unloaded]:
        """End every process of it, after what runs has ended or had so long to."""
        processes = [instance for instance in self.instances if instance.has_process]
        return list(await asyncio.gather(*(each.unload(drain_seconds) for each in processes)))

    def refuse_all(self, error: GallamaError) -> None:
        """Let all who wait hear the error."""
        waiting, self._waiting = self._waiting, deque()
        self._waiting_tokens = 0
        for each in waiting:
            if not each.slot.done():
                each.slot.set_exception(error)

    def changed(self) -> None:
        """Something about its instances or its place among the models is not as before."""
        if not self.is_loaded:
            self.is_yielding = False  # there is nothing left that it could yield
        if not self._may_become_ready():
            self.refuse_all(self._unavailable())
        self._assign()
        self._on_change()

    @contextlib.asynccontextmanager
    async def slot(self, work: Work, ticket: Ticket, *, in_front: bool = False) -> AsyncIterator[Slot]:
        """Wait for room, and hold it inside the context. Cancelling leaves the line.

        Args:
            in_front: for a request that had waited before and lost its worker.

        Raises:
            WorkerBusy: the line is full.
            DeadlineExceeded: the ticket's deadline came first.
            WorkerUnavailable, or the worker's own error: no instance lives or is about to.
        """
        waiting = self._enter(work, in_front=in_front)
        ticket.find_position = lambda: self._position(waiting)
        try:
            self._assign()
            self._on_change()
            slot = await self._wait(waiting, ticket.deadline)
        except BaseException:
            self._abandon(waiting)
            raise
        began = time.monotonic()
        try:
            yield slot
        finally:
            self._release(slot.instance, time.monotonic() - began)

    async def _wait(self, waiting: _Waiting, deadline: float | None) -> Slot:
        if deadline is None:
            return await waiting.slot
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await waiting.slot
        except TimeoutError:
            raise DeadlineExceeded(f"The request waited for {self.name} until its time was over.") from None

    def _position(self, waiting: _Waiting) -> int | None:
        try:
            return self._waiting.index(waiting) + 1
        except ValueError:
            return None

    def _enter(self, work: Work, *, in_front: bool) -> _Waiting:
        self.last_used = time.time()
        if self.is_closing or not self.instances:
            raise ModelUnloaded(
                f"{self.name} is being unloaded.", retry_after_seconds=_UNLOADING_RETRY_SECONDS
            )
        self._load_what_is_missing()
        if not self._may_become_ready():
            raise self._unavailable()
        waiting = _Waiting(work)
        if not in_front:
            self._check_room(work.tokens)
        enter: Callable[[_Waiting], None] = self._waiting.appendleft if in_front else self._waiting.append
        enter(waiting)
        self._waiting_tokens += work.tokens
        return waiting

    def _load_what_is_missing(self) -> None:
        if self.is_leaving:
            return  # it comes back as a whole
        if not self.is_loaded:
            self._ask_for_load(self)
            return
        for instance in self.instances:
            if instance.supervisor.state == "failed":
                instance.wake()

    def _check_room(self, tokens: int) -> None:
        """
        Raises:
            WorkerBusy: too many wait, or too much.
        """
        instances = [each for each in self.instances if each.is_coming] or self.instances
        slots = sum(each.capacity for each in instances)
        if self.busy + self.waiting >= slots + sum(each.model.spec.queue_limit for each in instances):
            raise self._too_busy("as many as may", slots)
        may_wait = sum(each.model.spec.queue_token_limit for each in instances)
        if self._waiting and self._waiting_tokens + tokens > may_wait:
            raise self._too_busy(f"with about {self._waiting_tokens} of at most {may_wait} tokens", slots)

    def _abandon(self, waiting: _Waiting) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            self._waiting_tokens -= waiting.work.tokens
            self._on_change()
        elif waiting.slot.done() and not waiting.slot.cancelled() and waiting.slot.exception() is None:
            # It got its slot in the very moment in which its client left.
            self._release(waiting.slot.result().instance, None)

    def _release(self, instance: Instance, service_seconds: float | None) -> None:
        instance.give_back()
        self.last_used = time.time()
        if service_seconds is not None:
            self._service_seconds += _SERVICE_TIME_WEIGHT * (service_seconds - self._service_seconds)
        self._assign()
        self._on_change()

    def _assign(self) -> None:
        """Give free slots to those who wait, in their order."""
        if self.is_yielding or self.is_closing or self.is_leaving:
            return
        while self._waiting and (free := [i for i, each in enumerate(self.instances) if each.has_room]):
            waiting = self._waiting.popleft()
            self._waiting_tokens -= waiting.work.tokens
            if waiting.slot.done():
                continue
            instance = self.instances[self._choose(free, waiting.work.blocks)]
            waiting.slot.set_result(Slot(instance, instance.take(waiting.work.blocks)))

    def _choose(self, free: Sequence[int], blocks: Sequence[bytes]) -> int:
        if len(self.instances) == 1:
            return free[0]
        loads = [self.instances[index].load(index, blocks) for index in free]
        return self._policy(loads).index

    def _may_become_ready(self) -> bool:
        return self.is_queued or self.is_leaving or any(each.is_coming for each in self.instances)

    def _unavailable(self) -> ReportedError | WorkerUnavailable:
        for instance in self.instances:
            if instance.supervisor.problem is not None:
                return ReportedError(instance.supervisor.problem)
        return WorkerUnavailable(f"No instance of {self.name} is running.")

    def _too_busy(self, how_many: str, slots: int) -> WorkerBusy:
        seconds = math.ceil(self._service_seconds * (self.waiting + 1) / max(slots, 1))
        return WorkerBusy(
            f"{self.name} answers {self.busy} requests and {self.waiting} wait, {how_many};"
            f" try again in about {seconds} s.",
            retry_after_seconds=min(max(seconds, 1), _MAX_RETRY_AFTER_SECONDS),
        )

    @property
    def states(self) -> list[InstanceState]:
        return [each.view(is_queued=self.is_queued).state for each in self.instances]

    def view(self) -> ServedModel:
        """What can be told of it now."""
        spec = self.model.spec
        return ServedModel(
            name=self.name,
            aliases=self.model.aliases,
            model_type=spec.model_type,
            backend=spec.backend,
            path=str(self.model.path),
            created=self.created,
            fingerprint=self.fingerprint,
            is_pinned=spec.pinned,
            ttl_seconds=spec.ttl_seconds,
            last_used=self.last_used,
            instances=tuple(each.view(is_queued=self.is_queued) for each in self.instances),
            waiting=self.waiting,
            waiting_tokens=self._waiting_tokens,
            loads=self._loads,
            load_failures=self._load_failures,
            restarts=self._restarts,
        )
