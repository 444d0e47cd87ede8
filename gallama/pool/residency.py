"""Which models are loaded: wishes in their order, within the limits, and who must leave for them.

`update` is the one place where it is decided, in one synchronous step, on what is true in that moment.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextvars import Context

from gallama.catalog import ResolvedModel
from gallama.errors import WorkerUnavailable
from gallama.pool.model_queue import ModelQueue

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class Residency:
    """Loads models that are asked for, and unloads others to make room or because nobody uses them."""

    def __init__(
        self,
        queues: Callable[[], Collection[ModelQueue]],
        *,
        auto_load: bool,
        max_loaded_models: int | None,
        minimum_stay_seconds: float,
        drain_seconds: float,
        lacks_memory: Callable[[ResolvedModel], bool],
    ) -> None:
        """
        Args:
            queues: every model there is.
            lacks_memory: whether it is known that a model does not fit beside what is loaded.
        """
        self._queues = queues
        self._auto_load = auto_load
        self._max_loaded = max_loaded_models
        self._minimum_stay_seconds = minimum_stay_seconds
        self._drain_seconds = drain_seconds
        self._lacks_memory = lacks_memory
        self._wishes: list[ModelQueue] = []
        """In their order."""
        self._ordered: set[ModelQueue] = set()
        """Wishes that hold although no request waits for them."""
        self._evictions: set[asyncio.Task[None]] = set()
        self._now = 0.0
        """When the last update began, in seconds since 1970: what was not due then is looked at again."""
        self._next_look: asyncio.TimerHandle | None = None
        self._is_updating = False
        self._must_update_again = False

    def ask(self, queue: ModelQueue) -> None:
        """A request has come for a model that is not loaded. It is granted by the next `update`.

        Raises:
            WorkerUnavailable: models are not loaded by requests, or only pinned ones could make room.
        """
        if not any(instance.may_start for instance in queue.instances):
            return
        has_failed = any(instance.supervisor.state == "failed" for instance in queue.instances)
        if not self._auto_load and not has_failed:
            raise WorkerUnavailable(
                f"{queue.name} is not loaded, and `auto_load` is off. Load it with POST /add_model or"
                f" `gallama load`.",
                code="model_not_loaded",
            )
        if queue not in self._ordered:
            self._check_that_others_may_leave(queue)
        self._wish(queue)

    def _check_that_others_may_leave(self, queue: ModelQueue) -> None:
        """
        Raises:
            WorkerUnavailable: whoever waits for this model would wait for ever.
        """
        pinned = [each.name for each in self._loaded() if each.model.spec.pinned]
        if self._max_loaded is not None and len(pinned) >= self._max_loaded:
            raise WorkerUnavailable(
                f"{queue.name} is not loaded, and has no room: `max_loaded_models` is {self._max_loaded}, and"
                f" what is loaded is pinned ({', '.join(pinned)}).",
                code="model_not_loaded",
            )

    def order(self, queue: ModelQueue) -> None:
        """Load the model as soon as there is room, whether or not somebody waits for it."""
        if queue.is_loaded and not queue.is_leaving:
            queue.wake()
        else:
            self._wish(queue)
            self._ordered.add(queue)
            self.update()

    def forget(self, queue: ModelQueue) -> None:
        """The model is not to be loaded any more."""
        if queue.is_queued:
            self._wishes.remove(queue)
            self._ordered.discard(queue)
            queue.is_queued = False

    def update(self) -> None:
        """Do all that can be done now."""
        self._must_update_again = True
        if self._is_updating:
            return
        self._is_updating = True
        try:
            while self._must_update_again:
                self._must_update_again = False
                self._now = time.time()
                self._withdraw_wishes()
                self._grant_wishes()
                self._unload_unused()
        finally:
            self._is_updating = False
        self._plan_next_look()

    async def close(self) -> None:
        """Decide nothing any more."""
        self._is_updating = True
        if self._next_look is not None:
            self._next_look.cancel()
        for task in self._evictions:
            task.cancel()
        await asyncio.gather(*self._evictions, return_exceptions=True)

    def _wish(self, queue: ModelQueue) -> None:
        if not queue.is_queued:
            queue.is_queued = True
            self._wishes.append(queue)

    def _withdraw_wishes(self) -> None:
        """Nobody waits any more for what was only asked for by requests."""
        for queue in list(self._wishes):
            if not queue.waiting and queue not in self._ordered:
                self.forget(queue)
        if not self._wishes:
            for queue in self._loaded():
                if queue.is_yielding:
                    queue.stay()

    def _grant_wishes(self) -> None:
        leaving = sum(queue.is_leaving for queue in self._queues())
        for queue in list(self._wishes):
            if queue.is_leaving:
                continue
            if self._has_room_for(queue):
                self.forget(queue)
                queue.wake()
            elif leaving > 0:
                leaving -= 1
            elif (victim := self._choose_victim()) is not None:
                logger.info("%s leaves to make room for %s.", victim.name, queue.name)
                self._evict(victim)
            else:
                return

    def _has_room_for(self, queue: ModelQueue) -> bool:
        loaded = list(self._loaded())
        if self._max_loaded is not None and len(loaded) >= self._max_loaded:
            return False
        # Where nobody can leave, the loader itself says what it lacks.
        can_wait = any(not each.model.spec.pinned for each in loaded)
        return not (can_wait and self._lacks_memory(queue.model))

    def _choose_victim(self) -> ModelQueue | None:
        """The idle model that was used the longest time ago. Where all are at work, the one that has stayed
        the longest is told to begin nothing new: it leaves when it has ended what it does."""
        stayed = [
            queue
            for queue in self._loaded()
            if queue.may_leave and self._now - queue.ready_since >= self._minimum_stay_seconds
        ]
        idle = [queue for queue in stayed if queue.is_idle]
        if idle:
            return min(idle, key=lambda queue: queue.last_used or 0.0)
        if stayed and not any(queue.is_yielding for queue in stayed):
            min(stayed, key=lambda queue: queue.ready_since).is_yielding = True
            self._must_update_again = True
        return None

    def _unload_unused(self) -> None:
        for queue in list(self._loaded()):
            if self._unused_at(queue) <= self._now:
                logger.info("%s is unloaded: nobody has used it for its `ttl_seconds`.", queue.name)
                self._evict(queue)

    def _unused_at(self, queue: ModelQueue) -> float:
        """When the model will have been idle for as long as it may be, in seconds since 1970."""
        ttl = queue.model.spec.ttl_seconds
        if ttl is None or queue.is_leaving or not queue.is_settled or not queue.is_idle:
            return float("inf")
        return max(queue.ready_since, queue.last_used or 0.0) + ttl

    def _evict(self, queue: ModelQueue) -> None:
        queue.is_leaving = True
        task = asyncio.create_task(self._unload(queue))
        self._evictions.add(task)
        task.add_done_callback(self._evictions.discard)

    async def _unload(self, queue: ModelQueue) -> None:
        try:
            await queue.unload(self._drain_seconds)
        finally:
            queue.is_leaving = queue.is_yielding = False
            if queue.waiting:
                self._wish(queue)
            queue.changed()

    def _plan_next_look(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        times = [self._unused_at(queue) for queue in self._loaded()]
        if self._wishes:
            times += [queue.ready_since + self._minimum_stay_seconds for queue in self._loaded()]
            times.append(self._now + _LOOK_SECONDS)  # memory may be given back by others than us
        coming = [at for at in times if self._now < at < float("inf")]
        if coming:
            delay = max(min(coming) - time.time(), 0)
            # In no request's name, whoever was the last to change something.
            self._next_look = asyncio.get_running_loop().call_later(delay, self.update, context=Context())

    def _loaded(self) -> Iterator[ModelQueue]:
        return (queue for queue in self._queues() if queue.is_loaded)
