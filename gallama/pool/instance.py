"""One instance of a model: its supervisor, and what it has to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context

import psutil

from gallama.catalog import ResolvedModel
from gallama.pool.gpus import GpuInventory, Placement, gpu_bytes_in_use
from gallama.pool.launchers import Launcher
from gallama.pool.routing import InstanceLoad, PrefixIndex
from gallama.pool.supervisor import Endpoint, SupervisionLimits, Supervisor
from gallama.pool.views import InstanceState, ServedInstance, Unloaded

logger = logging.getLogger(__name__)

_ALIVE: frozenset[InstanceState] = frozenset({"starting", "ready", "restarting"})


class Instance:
    """Answers so many requests at a time. What it counts changes here and nowhere else."""

    def __init__(
        self,
        number: int,
        model: ResolvedModel,
        launcher: Launcher,
        on_change: Callable[[Instance], None],
        *,
        limits: SupervisionLimits,
        place: Callable[[ResolvedModel], Awaitable[Placement]],
        inventory: GpuInventory,
        port: int,
        is_trial: bool,
    ) -> None:
        """
        Args:
            on_change: told of every change of its state.
            place: chooses its GPUs.
            is_trial: it is to be forgotten where its first load fails.
        """
        self.number = number
        self.model = model
        self.is_trial = is_trial
        self.is_draining = False
        self.is_going = False
        """It is being taken away: nothing is to load it again."""
        self.busy = 0
        self.served = 0
        self.prefixes = PrefixIndex(model.spec.cache_size)
        self.placement: Placement | None = None
        """Where it was last placed."""
        self._label = f"{model.name} (instance {number})"
        self.supervisor = Supervisor(
            model,
            launcher,
            self._supervisor_changed,
            limits=limits,
            is_busy=lambda: self.busy > 0,
            place=self._place,
            label=self._label,
        )
        self._choose_place = place
        self._has_new_state = False
        self._loaded_starts = 0
        self._port = port
        self._on_change = on_change
        self._inventory = inventory
        self._idle = asyncio.Event()
        self._idle.set()
        self._run: asyncio.Task[None] | None = None
        self._unloading: asyncio.Task[Unloaded] | None = None

    def start(self) -> None:
        """Let the supervisor work; it loads nothing before it is woken."""
        # Whatever happens to it later is not the doing of the request that has added it.
        self._run = asyncio.create_task(self.supervisor.run(), context=Context())

    async def close(self) -> None:
        """End the process at once, and the supervisor."""
        self.is_draining = True
        self._idle.set()  # what still runs is cut; whoever waits for an unload hears of it
        if self._run is not None:
            self._run.cancel()
        tasks = [task for task in (self._unloading, self._run) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def capacity(self) -> int:
        return self.model.spec.max_concurrent_requests

    @property
    def has_process(self) -> bool:
        """Whether it takes memory, or is about to."""
        return self.supervisor.state not in ("unloaded", "failed")

    @property
    def is_coming(self) -> bool:
        """Whether it answers requests, or will in a while."""
        return self.supervisor.state in _ALIVE and not self.is_draining

    @property
    def has_room(self) -> bool:
        return self.supervisor.state == "ready" and not self.is_draining and self.busy < self.capacity

    @property
    def may_start(self) -> bool:
        """Whether a wake would load the model."""
        return self.supervisor.may_start and not self.is_going

    def wake(self) -> None:
        """Load the model if it is not loaded, and may be."""
        if self.may_start:
            self.supervisor.wake()

    def has_new_state(self) -> bool:
        """Whether its supervisor's state, or why it is so, has changed since this was last asked."""
        is_new, self._has_new_state = self._has_new_state, False
        return is_new

    def has_loaded_anew(self) -> bool:
        """Whether a process has become ready since this was last asked."""
        starts, self._loaded_starts = self._loaded_starts, self.supervisor.starts
        return starts != self._loaded_starts

    def load(self, index: int, blocks: Sequence[bytes]) -> InstanceLoad:
        """What a routing policy may know of it."""
        return InstanceLoad(
            index=index,
            busy=self.busy,
            served=self.served,
            capacity=self.capacity,
            matched_blocks=self.prefixes.matched(blocks),
        )

    def take(self, blocks: Sequence[bytes]) -> Endpoint:
        """Begin to answer a request with such a prompt."""
        endpoint = self.supervisor.endpoint
        assert endpoint is not None, "only a ready instance has room"
        self.busy += 1
        self.served += 1
        self.prefixes.remember(blocks)
        self._idle.clear()
        return endpoint

    def give_back(self) -> None:
        """A request has ended."""
        self.busy -= 1
        if self.busy == 0:
            self._idle.set()

    async def unload(self, drain_seconds: float) -> Unloaded:
        """Take no more requests, let those that run end for so long, and end the process.

        Whoever asks for it while it is under way waits for the same end. It goes on when nobody waits.
        """
        if self._unloading is None:
            self._unloading = asyncio.create_task(self._unload(drain_seconds))
        return await asyncio.shield(self._unloading)

    async def _unload(self, drain_seconds: float) -> Unloaded:
        self.is_draining = True
        self._on_change(self)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_seconds):
                    await self._idle.wait()
            return await self._end_process()
        finally:
            self.is_draining = False
            self._unloading = None
            self._on_change(self)

    async def _end_process(self) -> Unloaded:
        cut_requests, process_id, gpus = self.busy, self.supervisor.process_id, self.supervisor.gpus
        gpu_bytes_before = await self._gpu_bytes(gpus)
        memory_bytes = await self.supervisor.unload()
        gpu_bytes = gpu_bytes_before - await self._gpu_bytes(gpus)
        is_gone = process_id is None or not psutil.pid_exists(process_id)
        is_verified = is_gone and (gpu_bytes > 0 or not gpus)
        logger.log(
            logging.INFO if is_verified else logging.WARNING,
            "%s has ended and gave back %.0f MB of memory, and %.0f MB of its GPUs%s.",
            self._label,
            memory_bytes / 1e6,
            max(gpu_bytes, 0) / 1e6,
            "" if is_verified else "; that could not be verified",
        )
        return Unloaded(
            name=self.model.name,
            instance=self.number,
            memory_bytes=memory_bytes,
            gpu_bytes=max(gpu_bytes, 0),
            is_verified=is_verified,
            cut_requests=cut_requests,
        )

    async def _place(self, model: ResolvedModel) -> Placement:
        self.placement = None  # what it had before is not taken any more
        self.placement = await self._choose_place(model)
        return self.placement

    async def _gpu_bytes(self, gpus: Sequence[int]) -> int:
        """Bytes in use on the GPUs; asking the driver may take a while."""
        return await asyncio.to_thread(gpu_bytes_in_use, self._inventory, gpus) if gpus else 0

    def _supervisor_changed(self) -> None:
        if self.supervisor.state != "ready":
            self.prefixes.forget()
        else:
            self.is_trial = False
        self._has_new_state = True
        self._on_change(self)

    def view(self, *, is_queued: bool) -> ServedInstance:
        """What can be told of it now.

        Args:
            is_queued: its model waits for room.
        """
        supervisor, endpoint = self.supervisor, self.supervisor.endpoint
        return ServedInstance(
            number=self.number,
            port=self._port,
            state=self._state(is_queued),
            progress=supervisor.progress,
            busy=self.busy,
            served=self.served,
            capacity=self.capacity,
            context_length=endpoint.context_length if endpoint else 0,
            ready_since=supervisor.ready_since,
            starts=supervisor.starts,
            process_id=supervisor.process_id,
            memory_bytes=supervisor.memory_bytes,
            gpus=supervisor.gpus,
            problem=supervisor.problem.message if supervisor.problem else "",
            status=supervisor.status,
        )

    def _state(self, is_queued: bool) -> InstanceState:
        if is_queued and not self.has_process:
            return "queued"
        if self.is_draining and self.supervisor.state in _ALIVE:
            return "draining"
        return self.supervisor.state
