"""Every model that the gateway serves: found by name, loaded when asked for, asked, and taken away."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from gallama.catalog import ResolvedModel, check_names
from gallama.config import ServerConfig
from gallama.config.model_spec import ModelType
from gallama.conversation import ChatEvent, ChatRequest, Failure
from gallama.embedding import EmbedRequest, RerankRequest
from gallama.errors import (
    DeadlineExceeded,
    GallamaError,
    InvalidConfig,
    ModelNotFound,
    ModelUnloaded,
    UnsupportedValue,
    WorkerDied,
)
from gallama.pool.account import Account
from gallama.pool.gpus import Gpu, GpuInventory, Placement, seen_gpus
from gallama.pool.instance import Instance
from gallama.pool.launchers import Launcher
from gallama.pool.launchers.local import LocalLauncher
from gallama.pool.load_tasks import LoadTasks
from gallama.pool.memory import Memory
from gallama.pool.model_queue import ModelQueue, Slot
from gallama.pool.residency import Residency
from gallama.pool.routing import POLICIES
from gallama.pool.supervisor import SupervisionLimits
from gallama.pool.ticket import RequestRecord, Ticket
from gallama.pool.views import InstanceState, LoadTask, Problem, ServedModel, Unloaded
from gallama.pool.work import Work, work_of
from gallama.wire import UnaryReply, UnaryRequest, ask, stream_chat

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_TRIES = 3
"""Workers that are asked one request, as long as none of them has begun to answer it."""
MAX_KEPT_PROBLEMS = 20
Observer = Callable[[RequestRecord], None]

_WHAT_IT_DOES: Mapping[ModelType, str] = {
    "llm": "makes text, and embeds none: ask it at /v1/chat/completions or /v1/completions",
    "embedding": "makes no text, it embeds: ask it at /v1/embeddings",
}


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model answers to a name."""

    name: str
    fingerprint: str
    """Changes when answers to the same request may change."""


class WorkerPool:
    """The models by name. Use it between `start` and `close`, in one event loop."""

    def __init__(
        self,
        models_to_load: Sequence[ResolvedModel],
        models_on_demand: Sequence[ResolvedModel] = (),
        *,
        config: ServerConfig | None = None,
        launcher: Launcher | None = None,
        inventory: GpuInventory = seen_gpus,
        observers: Sequence[Observer] = (),
    ) -> None:
        """
        Args:
            models_to_load: loaded by `start`; several entries of one name are several instances.
            models_on_demand: known for ever, and loaded by their first request where they are not loaded.
            observers: told of each request that has ended; of dry runs nobody is.

        Raises:
            InvalidConfig: names clash, or more models are to be loaded than may be.
        """
        self._config = config or ServerConfig()
        self._launcher = launcher or LocalLauncher()
        self._inventory = inventory
        self._memory = Memory(inventory, self._placed)
        self.gpus: Sequence[Gpu] = ()
        """Those that the gateway sees, as of the last `refresh`."""
        self._observers = list(observers)
        self._numbers = itertools.count(1)
        self._queues: dict[str, ModelQueue] = {}
        self._on_demand = _by_name(models_on_demand)
        self._to_load = list(_by_name(models_to_load))
        self._names_by_alias: dict[str, str] = {}
        self._tasks = LoadTasks()
        self._problems: deque[Problem] = deque(maxlen=MAX_KEPT_PROBLEMS)
        self._background: set[asyncio.Task[Any]] = set()
        self._is_running = False
        self._is_changing = False
        self._residency = Residency(
            lambda: self._queues.values(),
            auto_load=self._config.auto_load,
            max_loaded_models=self._config.max_loaded_models,
            minimum_stay_seconds=self._config.minimum_stay_seconds,
            drain_seconds=self._config.drain_seconds,
            lacks_memory=self._memory.lacks,
        )
        self._check_limit(models_to_load)
        check_names([*models_to_load, *models_on_demand])
        unloaded = [model for model in models_on_demand if model.name not in self._to_load]
        self._take_up([*models_to_load, *unloaded], is_trial=False)

    def start(self) -> None:
        """Begin to load the models that are to be loaded at the start."""
        self._is_running = True
        for queue in self._queues.values():
            for instance in queue.instances:
                instance.start()
        for name in self._to_load:
            self._residency.order(self._queues[name])

    async def close(self) -> None:
        """End every worker at once. Answers that run, and requests that wait, end with an error."""
        self._is_running = False
        for queue in self._queues.values():
            queue.is_closing = True
            queue.refuse_all(ModelUnloaded("The server ends."))
        await self._residency.close()
        instances = [instance for queue in self._queues.values() for instance in queue.instances]
        await asyncio.gather(*(instance.close() for instance in instances), return_exceptions=True)
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    async def settled(self) -> list[InstanceState]:
        """Wait until every instance that `start` loads has become ready or has failed; their states."""
        instances = [each for name in self._to_load for each in self._queues[name].instances]
        for instance in instances:
            await instance.supervisor.settled.wait()
        return [instance.supervisor.state for instance in instances]

    @property
    def models(self) -> list[ServedModel]:
        return [queue.view() for queue in self._queues.values()]

    @property
    def loads_at_start(self) -> list[ServedModel]:
        """The models that `start` loads, as far as they were not taken away since."""
        return [self._queues[name].view() for name in self._to_load if name in self._queues]

    def add_observer(self, observer: Observer) -> None:
        """Tell it of each request that ends from now on."""
        self._observers.append(observer)

    async def refresh(self) -> None:
        """Ask the workers and the GPUs: what is told of them is then of this moment."""
        instances = [instance for queue in self._queues.values() for instance in queue.instances]
        self.gpus = await asyncio.to_thread(self._inventory)
        await asyncio.gather(*(instance.supervisor.refresh() for instance in instances))

    @property
    def recent_problems(self) -> list[Problem]:
        """The newest last."""
        return list(self._problems)

    def identify(self, name: str, model_type: ModelType | None = "llm") -> ModelIdentity:
        """Which model answers to a name.

        Args:
            model_type: what it is asked for; None: what any model can do.

        Raises:
            ModelNotFound: none does.
            UnsupportedValue: it is for something else.
        """
        queue = self._queue_for(name, model_type)
        return ModelIdentity(queue.name, queue.fingerprint)

    @property
    def resolved_models(self) -> list[ResolvedModel]:
        """As what each model was loaded, or is to be."""
        return [queue.model for queue in self._queues.values()]

    def find(self, name: str) -> ServedModel:
        """All that can be told about the model that answers to a name.

        Raises:
            ModelNotFound: none does.
        """
        return self._queue_for(name).view()

    async def chat(
        self, request: ChatRequest, ticket: Ticket | None = None
    ) -> AsyncGenerator[ChatEvent, None]:
        """Ask the model that answers to `request.model`. Closing the generator cancels the request.

        Raises:
            ModelNotFound: no model answers to the name.
            UnsupportedValue: the model makes no text.
            WorkerBusy: too many others wait.
            DeadlineExceeded: the ticket's deadline came before the answer began.
            WorkerUnavailable, or the worker's own error: no worker can answer.
        """
        ticket = ticket or Ticket()
        queue = self._queue_for(request.model, "llm")
        request = msgspec.structs.replace(request, model=queue.name)
        account = Account(request, model=queue.name, key_name=ticket.key_name)
        try:
            async with aclosing(_events(queue, request, ticket, account)) as events:
                async for event in events:
                    account.take(event)
                    yield event
        except GallamaError as error:
            account.ends_in_error(error.report().code)
            raise
        finally:
            if not request.dry_run:
                self._observe(account.close(), ticket)

    async def ask(self, request: UnaryRequest, ticket: Ticket | None = None) -> UnaryReply:
        """Ask the model that answers to `request.model` what is answered all at once. Cancelling cancels it.

        Raises:
            As `chat`, and what the worker says against the request.
        """
        ticket = ticket or Ticket()
        queue = self._queue_for(request.model, _type_for(request))
        request = msgspec.structs.replace(request, model=queue.name)
        account = Account(request, model=queue.name, key_name=ticket.key_name)
        try:
            reply = await _reply(queue, request, ticket, account)
            account.take_reply(reply)
        except GallamaError as error:
            account.ends_in_error(error.report().code)
            raise
        finally:
            self._observe(account.close(), ticket)
        return reply

    def add(self, models: Sequence[ResolvedModel]) -> LoadTask:
        """Load instances of models beside what is there; each is loaded as soon as there is room.

        Models that a task is loading already are that task's: whoever asks twice gets what he has.
        Where a load fails, nothing of it is left but the task, which has the reason.

        Raises:
            InvalidConfig: a name belongs to another model.
        """
        under_way = self._tasks.under_way_for(_instances_of(models))
        if under_way is not None:
            return under_way
        check_names([*self._known_models(), *models])
        instances = self._take_up(models, is_trial=True)
        task = self._tasks.begin(instances)
        for name in _by_name(models):
            self._residency.order(self._queues[name])
        return self._tasks.find(task.id)

    def load(self, name: str) -> LoadTask:
        """Load a model that is known; what is loaded already is completed in the task.

        Raises:
            ModelNotFound: no model has the name.
        """
        queue = self._named(name)
        task = self._tasks.begin(queue.instances)
        self._residency.order(queue)
        return self._tasks.find(task.id)

    def task(self, task_id: str) -> LoadTask:
        """
        Raises:
            TaskNotFound: there is none, or it was forgotten.
        """
        return self._tasks.find(task_id)

    @property
    def tasks(self) -> list[LoadTask]:
        """The newest last."""
        return self._tasks.views

    async def remove(self, name: str) -> list[Unloaded]:
        """Let the model's answers end, and end its processes; instances that are added meanwhile stay.

        A model that was known before it was loaded stays known, and may be asked for again. If this is
        cancelled, it goes on all the same.

        Raises:
            ModelNotFound: no model has the name.
        """
        return await asyncio.shield(self._in_background(self._remove(self._named(name))))

    async def _remove(self, queue: ModelQueue) -> list[Unloaded]:
        going = list(queue.instances)
        for instance in going:
            instance.is_going = True
        queue.is_closing = True
        self._residency.forget(queue)
        queue.refuse_all(ModelUnloaded(f"{queue.name} was unloaded."))
        unloaded = await queue.unload(self._config.drain_seconds)
        queue.is_closing = not self._is_running
        for instance in going:
            if instance in queue.instances:
                self._drop(queue, instance, "The model was unloaded before it was loaded.")
        self._forget_or_reset(queue)
        return unloaded

    async def remove_instance(self, number: int) -> Unloaded:
        """Let one instance's answers end, and end its process; others of its model go on.

        If this is cancelled, it goes on all the same.

        Raises:
            ModelNotFound: there is none of the number.
        """
        found = [
            (queue, instance)
            for queue in self._queues.values()
            for instance in queue.instances
            if instance.number == number
        ]
        if not found:
            raise ModelNotFound(f"There is no instance {number}.")
        return await asyncio.shield(self._in_background(self._remove_instance(*found[0])))

    async def _remove_instance(self, queue: ModelQueue, instance: Instance) -> Unloaded:
        instance.is_going = True
        unloaded = await instance.unload(self._config.drain_seconds)
        if instance in queue.instances:
            self._drop(queue, instance, "The instance was stopped before its model was loaded.")
            self._forget_or_reset(queue)
        return unloaded

    def _take_up(self, models: Iterable[ResolvedModel], *, is_trial: bool) -> list[Instance]:
        """New instances, in the queues of their names."""
        instances = []
        for group in _by_name(models).values():
            queue = self._queue_of(group[0])
            instances += [
                self._new_instance(queue, model, is_trial=is_trial) for model in _instances_of(group)
            ]
        return instances

    def _queue_of(self, model: ResolvedModel) -> ModelQueue:
        """The queue of a model that gets instances; those that hold nothing give way to them."""
        queue = self._queues.get(model.name)
        if queue is None:
            queue = ModelQueue(
                model,
                POLICIES[self._config.policy],
                ask_for_load=self._residency.ask,
                on_change=self._changed,
            )
            self._queues[model.name] = queue
        for instance in list(queue.instances):
            if not instance.has_process and not queue.is_queued:
                self._drop(queue, instance, "Another order took its place.")
        return queue

    def _new_instance(self, queue: ModelQueue, model: ResolvedModel, *, is_trial: bool) -> Instance:
        number = next(self._numbers)
        instance = Instance(
            number,
            model,
            self._launcher,
            lambda changed: self._instance_changed(queue, changed),
            limits=SupervisionLimits.of(self._config),
            place=self._memory.place,
            inventory=self._inventory,
            port=self._config.port + number,
            is_trial=is_trial,
        )
        queue.add(instance)
        self._names_by_alias |= dict.fromkeys(model.aliases, model.name)
        if self._is_running:
            instance.start()
        return instance

    def _placed(self) -> list[Placement]:
        """Where those go that are being loaded."""
        return [
            instance.placement
            for queue in self._queues.values()
            for instance in queue.instances
            if instance.placement is not None and instance.supervisor.state in ("starting", "restarting")
        ]

    def _instance_changed(self, queue: ModelQueue, instance: Instance) -> None:
        problem = instance.supervisor.problem
        if instance.has_new_state():
            queue.count(instance)
            if problem is not None:
                self._note_problem(queue.name, instance.number, problem.code, problem.message)
        queue.changed()

    def _note_problem(self, model: str, instance: int, code: str, message: str) -> None:
        last = self._problems[-1] if self._problems else None
        if last is None or (last.model, last.instance, last.message) != (model, instance, message):
            problem = Problem(at=time.time(), model=model, instance=instance, code=code, message=message)
            self._problems.append(problem)

    def _changed(self) -> None:
        """Draw the consequences of whatever has changed."""
        if self._is_changing or not self._is_running:
            return
        self._is_changing = True
        try:
            self._tasks.update()
            self._drop_failed_trials()
        finally:
            self._is_changing = False
        self._residency.update()

    def _drop_failed_trials(self) -> None:
        for queue in list(self._queues.values()):
            for instance in list(queue.instances):
                if instance.is_trial and instance.supervisor.state == "failed":
                    self._drop(queue, instance, "")
                    self._forget_or_reset(queue)

    def _drop(self, queue: ModelQueue, instance: Instance, why: str) -> None:
        """An instance without a process is not to come back."""
        self._tasks.give_up(instance, why)
        queue.take_away(instance)
        self._in_background(instance.close())

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Work that `close` waits for, and nobody else need."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _forget_or_reset(self, queue: ModelQueue) -> None:
        """What a model without instances comes to: known and unloaded again, or nothing."""
        if queue.instances or self._queues.get(queue.name) is not queue:
            return
        self._residency.forget(queue)
        queue.refuse_all(ModelUnloaded(f"{queue.name} was unloaded."))
        known = self._on_demand.get(queue.name)
        if known:
            for model in _instances_of(known):
                self._new_instance(queue, model, is_trial=False)
            return
        del self._queues[queue.name]
        self._names_by_alias = {
            alias: name for alias, name in self._names_by_alias.items() if name != queue.name
        }

    def _known_models(self) -> list[ResolvedModel]:
        return [instance.model for queue in self._queues.values() for instance in queue.instances]

    def _check_limit(self, models_to_load: Sequence[ResolvedModel]) -> None:
        names, limit = _by_name(models_to_load), self._config.max_loaded_models
        if limit is not None and len(names) > limit:
            asked = ", ".join(names)
            raise InvalidConfig(
                f"`max_loaded_models` is {limit}, but {len(names)} models are to be loaded: {asked}."
            )

    def _queue_for(self, name: str, model_type: ModelType | None = None) -> ModelQueue:
        """The model of the name, or the one of its type that answers to all names.

        Raises:
            ModelNotFound: there is none.
            UnsupportedValue: the model of the name is of another type.
        """
        queue = self._queues.get(self._names_by_alias.get(name, name))
        if queue is not None:
            own_type = queue.model.spec.model_type
            if model_type not in (None, own_type):
                raise UnsupportedValue(f"{queue.name} {_WHAT_IT_DOES[own_type]}.", param="model")
            return queue
        fitting = [each for each in self._queues.values() if model_type in (None, each.model.spec.model_type)]
        candidates = [each for each in fitting if each.is_wanted] or fitting
        if self._config.strict or len(candidates) != 1 or candidates[0].model.spec.strict:
            raise ModelNotFound(f"No model is called {name[:80]!r}.", param="model")
        return candidates[0]

    def _named(self, name: str) -> ModelQueue:
        """
        Raises:
            ModelNotFound: no model has exactly this name or alias.
        """
        queue = self._queues.get(self._names_by_alias.get(name, name))
        if queue is None:
            raise ModelNotFound(f"No model is called {name[:80]!r}.", param="model")
        return queue

    def _observe(self, record: RequestRecord, ticket: Ticket) -> None:
        """Tell of a request that has ended. Whoever listens must not cost its client anything."""
        listeners = [*self._observers, *filter(None, [ticket.on_end])]
        for listener in listeners:
            try:
                listener(record)
            except Exception:
                logger.exception("An observer failed on request %s.", record.request_id)


async def _events(
    queue: ModelQueue, request: ChatRequest, ticket: Ticket, account: Account
) -> AsyncGenerator[ChatEvent, None]:
    """The answer's events, from another worker where one died before the first."""
    work = work_of(request)
    while account.tries < MAX_TRIES:
        async with (
            _slot(queue, work, ticket, account) as slot,
            aclosing(_stream(slot, request, ticket.deadline)) as events,
        ):
            async for event in events:
                if event is None:
                    break
                yield event
            else:
                return
    raise _too_many_died(queue)


async def _reply(queue: ModelQueue, request: UnaryRequest, ticket: Ticket, account: Account) -> UnaryReply:
    """The answer, from another worker where one died before it was there."""
    work = work_of(request)
    while account.tries < MAX_TRIES:
        async with _slot(queue, work, ticket, account) as slot:
            try:
                asking = ask(slot.endpoint.address, slot.endpoint.secret, request)
                return await _before(ticket.deadline, asking)
            except OSError:
                slot.report_broken()
    raise _too_many_died(queue)


@contextlib.asynccontextmanager
async def _slot(queue: ModelQueue, work: Work, ticket: Ticket, account: Account) -> AsyncIterator[Slot]:
    """A slot for one more try; whoever has lost a worker does not wait behind the others again."""
    account.waits()
    async with queue.slot(work, ticket, in_front=account.tries > 0) as slot:
        account.is_given_to(slot.instance.number)
        yield slot


def _too_many_died(queue: ModelQueue) -> WorkerDied:
    return WorkerDied(f"{MAX_TRIES} workers of {queue.name} died before they began to answer.")


def _type_for(request: UnaryRequest) -> ModelType | None:
    return "embedding" if isinstance(request, EmbedRequest | RerankRequest) else None


async def _stream(
    slot: Slot, request: ChatRequest, deadline: float | None
) -> AsyncGenerator[ChatEvent | None, None]:
    """The worker's events; a single None when it died before the first: another may be asked."""
    has_begun = False
    try:
        endpoint = slot.endpoint
        async with aclosing(stream_chat(endpoint.address, endpoint.secret, request)) as events:
            while (event := await _before(deadline, _next(events))) is not None:
                has_begun = True
                yield event
    except DeadlineExceeded as error:
        if not has_begun:
            raise
        yield Failure(error.report())
    except OSError:
        slot.report_broken()
        yield Failure(_why_it_broke(slot, request.model).report()) if has_begun else None


def _why_it_broke(slot: Slot, model: str) -> GallamaError:
    if slot.instance.is_draining:
        return ModelUnloaded(f"{model} was unloaded while it answered.")
    return WorkerDied(f"The worker of {model} ended while it answered.")


async def _next(events: AsyncGenerator[ChatEvent, None]) -> ChatEvent | None:
    """The next event; None after the last."""
    return await anext(events, None)


async def _before(deadline: float | None, work: Coroutine[Any, Any, T]) -> T:
    """
    Raises:
        DeadlineExceeded: the deadline, in `time.monotonic()`'s seconds, comes first.
    """
    if deadline is None:
        return await work
    try:
        async with asyncio.timeout(deadline - time.monotonic()) as limit:
            return await work
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded("The answer was not complete when the request's time was over.") from None


def _instances_of(models: Iterable[ResolvedModel]) -> list[ResolvedModel]:
    """One entry for each instance."""
    return [model for model in models for _ in range(model.spec.replicas)]


def _by_name(models: Iterable[ResolvedModel]) -> dict[str, list[ResolvedModel]]:
    groups: dict[str, list[ResolvedModel]] = {}
    for model in models:
        groups.setdefault(model.name, []).append(model)
    return groups
