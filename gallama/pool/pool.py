"""Every model that the gateway serves: found by name, loaded when asked for, asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from gallama.catalog import ResolvedModel
from gallama.conversation import ChatEvent, ChatRequest, Failure
from gallama.errors import InvalidConfig, ModelNotFound, WorkerDied
from gallama.pool.launchers import Launcher
from gallama.pool.launchers.local import LocalLauncher
from gallama.pool.model_queue import ModelQueue, Slot
from gallama.pool.routing import POLICIES
from gallama.pool.supervisor import InstanceState
from gallama.wire import stream_chat


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What can be told about a model without asking its worker."""

    name: str
    aliases: tuple[str, ...]
    created: int
    """Seconds since 1970 at which the gateway took it up."""
    fingerprint: str
    """Changes when answers to the same request may change."""
    states: tuple[InstanceState, ...]
    """Of its instances."""
    problem: str
    """Why it is not ready; "" when nothing went wrong."""
    busy: int
    waiting: int


class WorkerPool:
    """The models by name. Use it between `start` and `close`, in one event loop."""

    def __init__(
        self,
        models_to_load: Sequence[ResolvedModel],
        models_on_demand: Sequence[ResolvedModel] = (),
        *,
        strict: bool = False,
        launcher: Launcher | None = None,
        policy: str = "least_busy",
    ) -> None:
        """
        Args:
            models_to_load: loaded by `start`; several entries of one name are several instances.
            models_on_demand: loaded by their first request.
            strict: a name that no model has is never answered by another model.
        """
        launcher = launcher or LocalLauncher()
        self._strict = strict
        self._to_load = [model.name for model in models_to_load]
        self._queues: dict[str, ModelQueue] = {
            name: ModelQueue(models, launcher, POLICIES[policy])
            for name, models in _group_by_name([*models_to_load, *models_on_demand]).items()
        }
        self._names_by_alias = _names_by_alias(self._queues)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to load the models that are to be loaded at the start."""
        supervisors = [each for queue in self._queues.values() for each in queue.supervisors]
        self._tasks = [asyncio.create_task(supervisor.run()) for supervisor in supervisors]
        for name in self._to_load:
            self._queues[name].wake()

    async def close(self) -> None:
        """End every worker."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def settled(self) -> list[InstanceState]:
        """Wait until every instance that `start` loads has become ready or has failed; their states."""
        supervisors = [
            each for name in dict.fromkeys(self._to_load) for each in self._queues[name].supervisors
        ]
        for supervisor in supervisors:
            await supervisor.settled.wait()
        return [supervisor.state for supervisor in supervisors]

    @property
    def models(self) -> list[ServedModel]:
        return [_describe(queue) for queue in self._queues.values()]

    @property
    def loads_at_start(self) -> list[ServedModel]:
        """The models that `start` loads."""
        return [_describe(self._queues[name]) for name in dict.fromkeys(self._to_load)]

    def find(self, name: str) -> ServedModel:
        """The model that answers to a name.

        Raises:
            ModelNotFound: none does.
        """
        return _describe(self._queue_for(name))

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Ask the model that answers to `request.model`. Closing the generator cancels the request.

        Raises:
            ModelNotFound: no model answers to the name.
            WorkerBusy: too many others wait.
            WorkerUnavailable, or the worker's own error: no worker can answer.
        """
        queue = self._queue_for(request.model)
        request = msgspec.structs.replace(request, model=queue.model.name)
        for is_second_try in (False, True):
            async with (
                queue.slot(request, in_front=is_second_try) as slot,
                aclosing(_ask(slot, request)) as events,
            ):
                async for event in events:
                    if event is None:
                        break
                    yield event
                else:
                    return
        raise WorkerDied(f"Two workers of {queue.model.name} died before they began to answer.")

    def _queue_for(self, name: str) -> ModelQueue:
        queue = self._queues.get(self._names_by_alias.get(name, name))
        if queue is not None:
            return queue
        loaded = [queue for queue in self._queues.values() if queue.is_loaded]
        candidates = loaded or list(self._queues.values())
        if self._strict or len(candidates) != 1 or candidates[0].model.spec.strict:
            raise ModelNotFound(f"No model is called {name[:80]!r}.", param="model")
        return candidates[0]


async def _ask(slot: Slot, request: ChatRequest) -> AsyncGenerator[ChatEvent | None, None]:
    """The worker's events; a single None when it died before the first: another may be asked."""
    has_begun = False
    try:
        endpoint = slot.endpoint
        async with aclosing(stream_chat(endpoint.address, endpoint.secret, request)) as events:
            async for event in events:
                has_begun = True
                yield event
    except OSError:
        slot.report_broken()
        died = WorkerDied(f"The worker of {request.model} ended while it answered.")
        yield Failure(died.report()) if has_begun else None


def _group_by_name(models: Sequence[ResolvedModel]) -> Mapping[str, list[ResolvedModel]]:
    groups: dict[str, list[ResolvedModel]] = {}
    for model in models:
        groups.setdefault(model.name, []).append(model)
    return groups


def _names_by_alias(queues: Mapping[str, ModelQueue]) -> Mapping[str, str]:
    """
    Raises:
        InvalidConfig: an alias means two models.
    """
    names: dict[str, str] = {}
    for name, queue in queues.items():
        for alias in queue.model.aliases:
            if (alias in queues and alias != name) or names.get(alias, name) != name:
                raise InvalidConfig(f"The alias {alias!r} of {name} is also a name of another model.")
            names[alias] = name
    return names


def _describe(queue: ModelQueue) -> ServedModel:
    model = queue.model
    return ServedModel(
        name=model.name,
        aliases=model.aliases,
        created=queue.created,
        fingerprint=queue.fingerprint,
        states=tuple(queue.states),
        problem=queue.problem,
        busy=queue.busy,
        waiting=queue.waiting,
    )
