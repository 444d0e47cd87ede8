"""The pool under random orders, requests and accidents: nothing is lost, nothing is held, all comes to rest.

Time is simulated: when nothing is left to do, the clock jumps to the next timer. Minutes of back-off and
draining take milliseconds, and a seed gives the same course each time. The clock also moves a little whenever
it is read, as real ones do. What waits for nothing that will ever come is an error at once.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from gallama.catalog import ResolvedModel
from gallama.config import ServerConfig
from gallama.conversation import Accepted, AnswerText, ChatEvent, ChatRequest, Failure, Message
from gallama.errors import GallamaError, InvalidConfig, ModelLoadFailed, ModelNotFound
from gallama.pool import account, model_queue, pool, residency, supervisor
from gallama.pool.gpus import Placement
from gallama.pool.launchers import RunningWorker
from gallama.pool.pool import WorkerPool
from gallama.pool.ticket import RequestRecord, Ticket
from gallama.wire import BrokenLink, Ready, WorkerStatus
from tests.pool.fake_workers import DONE, model

PATIENCE_SECONDS = 3600.0
"""Simulated; no request, order or removal may take longer, whatever happens."""
CLOSE_SECONDS = 30.0
"""Simulated; what the pool may take to end."""
Simulate = Callable[[int, Callable[["Course"], Coroutine[Any, Any, None]]], None]


class SimulatedTime(asyncio.SelectorEventLoop):
    """A loop in which waiting takes no time."""

    def __init__(self) -> None:
        self._now = 1_000_000.0
        super().__init__(_Waits(self))

    def time(self) -> float:
        self._now += 1e-6
        return self._now

    def pass_by(self, seconds: float) -> None:
        self._now += seconds


class _Waits(selectors.DefaultSelector):
    def __init__(self, loop: SimulatedTime) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "all wait, and there is nothing that they could wait for"
        self._loop.pass_by(max(timeout, 0.0))
        return super().select(0)


class Worker:
    """A process as the pool sees it, without one."""

    secret = "secret"
    process_id = None

    def __init__(self, model: ResolvedModel, machine: Machine, number: int) -> None:
        self.model = model
        self.address = str(number)
        self.running = 0
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._machine = machine

    async def ready(self, on_progress: Callable[[float], None]) -> Ready:
        on_progress(0.5)
        fails = self._machine.chance(0.15)
        await self.unless_dead(self._machine.some_seconds(5), ModelLoadFailed("It died."))
        if fails:
            raise ModelLoadFailed("Not enough memory.")
        return Ready(address=self.address, context_length=100)

    def memory_bytes(self) -> int:
        return 1000

    async def exited(self) -> str:
        return await asyncio.shield(self.died)

    async def stop(self) -> None:
        try:
            await asyncio.wait({self.died}, timeout=self._machine.some_seconds(6))
        finally:
            self.die()
            self._machine.alive.remove(self)

    def die(self) -> None:
        if not self.died.done():
            self.died.set_result("was killed by SIGKILL")

    async def unless_dead(self, seconds: float, error: Exception) -> None:
        """Let time pass; the error is raised as soon as the process dies."""
        await asyncio.wait({self.died}, timeout=seconds)
        if self.died.done():
            raise error


class Machine:
    """Starts workers, and is the wire to them."""

    def __init__(self, rng: random.Random, max_loaded_models: int | None) -> None:
        self.alive: list[Worker] = []
        self._workers: list[Worker] = []
        self._rng = rng
        self._max_loaded_models = max_loaded_models

    def chance(self, part: float) -> bool:
        return self._rng.random() < part

    def some_seconds(self, most: float) -> float:
        """Often none at all."""
        return self._rng.choice((0.0, 0.001, self._rng.random() * most))

    async def some_turns(self) -> None:
        """What comes over a wire may come a little later."""
        for _ in range(self._rng.randrange(4)):
            await asyncio.sleep(0)

    async def launch(self, model: ResolvedModel, placement: Placement | None = None) -> RunningWorker:
        await self.some_turns()
        worker = Worker(model, self, len(self._workers))
        self._workers.append(worker)
        self.alive.append(worker)
        self.check()
        return worker

    def check(self) -> None:
        """Never more models than may be loaded, never more requests than a worker takes."""
        names = {worker.model.name for worker in self.alive}
        assert self._max_loaded_models is None or len(names) <= self._max_loaded_models, names
        for worker in self._workers:
            assert worker.running <= worker.model.spec.max_concurrent_requests

    async def stream_chat(
        self, address: str, secret: str, request: ChatRequest
    ) -> AsyncGenerator[ChatEvent, None]:
        worker = self._workers[int(address)]
        await self.some_turns()
        if worker.died.done():
            raise ConnectionRefusedError
        what, seconds = request.messages[0].content.split()
        worker.running += 1
        self.check()
        try:
            if what == "die-before" and self.chance(0.7):
                worker.die()
            await worker.unless_dead(float(seconds) / 2, BrokenLink("hung up"))
            yield Accepted(1)
            if what == "die-after":
                worker.die()
            await worker.unless_dead(float(seconds) / 2, BrokenLink("hung up"))
            yield AnswerText(0, f"{worker.model.name} {request.request_id}")
            yield DONE
        finally:
            worker.running -= 1

    async def tell(self, address: str, secret: str) -> WorkerStatus:
        """Its status, with or without a token."""
        worker = self._workers[int(address)]
        await self.some_turns()
        if worker.died.done():
            raise ConnectionRefusedError
        return WorkerStatus(busy_slots=0, waiting=0, cached_tokens=0)

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """As `asyncio.to_thread`."""
        await self.some_turns()
        return work(*arguments)


class Course:
    """One seed's course of events."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.max_loaded_models = self.rng.choice((None, 1, 2, 2))
        self.machine = Machine(self.rng, self.max_loaded_models)
        self.records: list[RequestRecord] = []
        self.asked = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.ended: list[asyncio.Task[None]] = []
        known = [self._model(name) for name in "abcd"]
        self.pool = WorkerPool(
            known[:1],
            known if self.rng.random() < 0.5 else known[1:],
            config=ServerConfig.model_validate(
                {
                    "max_loaded_models": self.max_loaded_models,
                    "minimum_stay_seconds": self.rng.choice((0, 0.5, 10)),
                    "drain_seconds": self.rng.choice((0, 1, 30)),
                    "auto_load": self.rng.random() < 0.9,
                    "policy": self.rng.choice(("least_busy", "round_robin", "prefix_affinity")),
                }
            ),
            launcher=self.machine,
            inventory=lambda: (),
            observers=[self.records.append],
        )

    def _model(self, name: str) -> ResolvedModel:
        values: dict[str, Any] = {
            "replicas": self.rng.choice((1, 1, 2)),
            "max_concurrent_requests": self.rng.choice((1, 2, 4)),
            "queue_limit": self.rng.choice((2, 100)),
            "ttl_seconds": self.rng.choice((None, None, 2, 60)),
        }
        # A second pinned one could keep all others out for ever.
        values["pinned"] = name == "a" and self.max_loaded_models != 1 and self.rng.random() < 0.3
        return model(name, (f"{name}-alias",), **values)

    def _outcome(self, request_id: str) -> str:
        (outcome,) = (record.outcome for record in self.records if record.request_id == request_id)
        return outcome

    async def until(self, steps: int) -> None:
        """Do so many random things."""
        self.pool.start()
        for _ in range(steps):
            self._do_something()
            await self._pause()
            self.check()

    async def _pause(self) -> None:
        match self.rng.randrange(10):
            case 0:
                await asyncio.sleep(self.rng.random() * 20)
            case 1 | 2 | 3:
                await asyncio.sleep(self.rng.random() * 0.5)
            case _:
                await self.machine.some_turns()

    def _do_something(self) -> None:
        chance, name = self.rng.random(), self.rng.choice("abcde")
        if chance < 0.6:
            self._begin(self._ask, name, f"r{self.asked}")
        elif chance < 0.68 and self.tasks:
            self.rng.choice(sorted(self.tasks, key=lambda task: task.get_name())).cancel()
        elif chance < 0.75:
            if self.machine.alive:
                self.rng.choice(self.machine.alive).die()
        elif chance < 0.82:
            self._add(name)
        elif chance < 0.87:
            self._load(name)
        elif chance < 0.94:
            self._begin(self._remove, self.pool.remove, self.rng.choice((name, f"{name}-alias")))
        else:
            numbers = [each.number for served in self.pool.models for each in served.instances]
            self._begin(self._remove, self.pool.remove_instance, self.rng.choice([0, *numbers]))

    def _begin(self, do: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        self.asked += 1
        task = asyncio.create_task(self._within_patience(do, *arguments), name=f"{self.asked:06}")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(self.ended.append)

    async def _within_patience(self, do: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS) as limit:
                await do(*arguments)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            assert current is not None
            assert current.cancelling(), "nobody has cancelled it"
            raise
        assert not limit.expired()

    async def _ask(self, name: str, request_id: str) -> None:
        what = self.rng.choice(("say", "say", "say", "say", "die-before", "die-after"))
        seconds = self.machine.some_seconds(self.rng.choice((0.1, 1, 60)))
        ticket = Ticket()
        if self.rng.random() < 0.2:
            ticket.deadline = asyncio.get_running_loop().time() + self.machine.some_seconds(30)
        request = ChatRequest(
            request_id=request_id,
            model=name,
            messages=(Message(role="user", content=f"{what} {seconds}"),),
        )
        heard: list[ChatEvent] = []
        problem: GallamaError | None = None
        try:
            async with aclosing(self.pool.chat(request, ticket)) as events:
                heard.extend([event async for event in events])
        except GallamaError as error:
            problem = error
        if isinstance(problem, ModelNotFound):
            return
        outcome = self._outcome(request_id)
        if problem is not None:
            assert outcome in ("refused", "failed")
            assert problem.report().status in (429, 503, 504), problem
        elif isinstance(heard[-1], Failure):
            assert outcome == "failed"
        else:
            assert heard[-1] == DONE
            assert [event.text.split()[1] for event in heard if isinstance(event, AnswerText)] == [request_id]
            assert outcome == "completed"

    async def _remove(self, remove: Callable[[Any], Coroutine[Any, Any, Any]], which: str | int) -> None:
        with suppress(ModelNotFound):
            await remove(which)

    def _add(self, name: str) -> None:
        with suppress(InvalidConfig):
            self.pool.add([self._model(name)])

    def _load(self, name: str) -> None:
        with suppress(ModelNotFound):
            self.pool.load(name)

    def check(self) -> None:
        """What holds at every moment."""
        self.machine.check()
        while self.ended:
            if not (task := self.ended.pop()).cancelled():
                task.result()
        for served in self.pool.models:
            assert served.waiting_tokens >= 0
            assert served.waiting or not served.waiting_tokens
            for instance in served.instances:
                assert 0 <= instance.busy <= instance.capacity

    async def come_to_rest(self) -> None:
        """Everybody gets what he waits for, or hears why not."""
        while self.tasks:
            await asyncio.wait(set(self.tasks))
        await asyncio.sleep(300)
        self.check()
        assert len({record.request_id for record in self.records}) == len(self.records)
        assert {task.status for task in self.pool.tasks} <= {"completed", "failed"}
        for queue in self.pool._queues.values():
            served = queue.view()
            assert (served.busy, served.waiting, served.waiting_tokens) == (0, 0, 0)
            assert set(served.states) <= {"unloaded", "ready", "failed"}
            assert not any((queue.is_queued, queue.is_yielding, queue.is_leaving, queue.is_closing))

    async def close(self) -> None:
        """All ends in time, and nothing is left."""
        async with asyncio.timeout(CLOSE_SECONDS):
            await self.pool.close()
            while self.tasks:
                await asyncio.wait(set(self.tasks))
        self.check()
        assert self.machine.alive == []
        assert len({record.request_id for record in self.records}) == len(self.records)
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Runs the course of a seed in simulated time."""

    def run(seed: int, course_of: Callable[[Course], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            errors: list[dict[str, Any]] = []
            loop.set_exception_handler(lambda _, context: errors.append(context))
            clock = SimpleNamespace(time=loop.time, monotonic=loop.time)
            for module in (account, model_queue, pool, residency, supervisor):
                monkeypatch.setattr(module, "time", clock)
            course = Course(seed)
            monkeypatch.setattr(pool, "stream_chat", course.machine.stream_chat)
            monkeypatch.setattr(supervisor, "ask_status", course.machine.tell)
            monkeypatch.setattr(supervisor, "ask_for_token", course.machine.tell)
            monkeypatch.setattr(asyncio, "to_thread", course.machine.in_thread)
            await course_of(course)
            assert errors == []

        with asyncio.Runner(loop_factory=SimulatedTime) as runner:
            runner.run(main())

    return run


@pytest.mark.parametrize("seed", range(60))
def test_everything_comes_to_rest(simulate: Simulate, seed: int) -> None:
    async def course_of(course: Course) -> None:
        await course.until(steps=150)
        await course.come_to_rest()
        await course.close()

    simulate(seed, course_of)


@pytest.mark.parametrize("seed", range(100, 160))
def test_a_pool_that_is_closed_in_the_middle_ends_everything(simulate: Simulate, seed: int) -> None:
    async def course_of(course: Course) -> None:
        await course.until(steps=80)
        await course.close()

    simulate(seed, course_of)
