"""The supervisor over real processes where a process matters, else over workers inside the test."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from gallama.catalog import ResolvedModel
from gallama.config import ModelSpec, ServerConfig
from gallama.conversation import Accepted, AnswerText, ChatEvent, ChatRequest, Completed, Message, Usage
from gallama.errors import CrashLoop, GallamaError, InvalidConfig, ModelLoadFailed
from gallama.generation import EngineStatus
from gallama.pool import supervisor as supervisor_module
from gallama.pool.gpus import Placement
from gallama.pool.launchers import Launcher, RunningWorker
from gallama.pool.launchers import local as local_module
from gallama.pool.launchers.local import LocalLauncher
from gallama.pool.supervisor import Backoff, CrashCounter, SupervisionLimits, Supervisor, patience
from gallama.pool.views import InstanceState
from gallama.wire import Ready, WorkerStatus, stream_chat
from tests.pool.fake_workers import ServingWorker

SELDOM = SupervisionLimits(probe_interval_seconds=60, hang_seconds=60)
OFTEN = SupervisionLimits(probe_interval_seconds=0.1, hang_seconds=1.0)
Supervise = Callable[..., Supervisor]


def scripted(values: dict[str, Any] | None = None, **script: Any) -> ResolvedModel:
    spec = {"model_id": "any", "backend": "scripted", "backend_extra_args": script, **(values or {})}
    return ResolvedModel(name="m", aliases=(), path=Path("any"), spec=ModelSpec.model_validate(spec))


@pytest.fixture
def fake_program(tmp_path: Path) -> Callable[[str], ResolvedModel]:
    """A model whose worker is a program of the test's own, that is ready at once, and then does this."""

    def write(then: str, *, is_ready: bool = True) -> ResolvedModel:
        program = tmp_path / "python"
        ready = 'print(json.dumps({"type": "Ready", "address": address, "context_length": 9}), flush=True)'
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, os, signal, socket, subprocess, sys, time\n"
            'order = json.loads(sys.stdin.readline())\naddress = order["address"]\n'
            "listener = socket.socket(socket.AF_UNIX)\n"
            'listener.bind(address.removeprefix("unix:"))\nlistener.listen()\n'
            f"{ready if is_ready else ''}\n{then}\ntime.sleep(1000)\n"
        )
        program.chmod(0o700)
        return scripted({"python": str(program)})

    return write


@pytest.fixture
async def supervise() -> AsyncIterator[Supervise]:
    """Supervises until the test has ended; then no process may be left."""
    runs: list[asyncio.Task[None]] = []

    def begin(model: ResolvedModel, launcher: Launcher | None = None, **options: Any) -> Supervisor:
        on_change = options.pop("on_change", lambda: None)
        options.setdefault("limits", SELDOM)
        supervisor = Supervisor(model, launcher or LocalLauncher(), on_change, **options)
        runs.append(asyncio.create_task(supervisor.run()))
        return supervisor

    yield begin
    for run in runs:
        run.cancel()
    await asyncio.gather(*runs, return_exceptions=True)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(supervisor_module, "_EXIT_NOTICE_SECONDS", 0.05)
    monkeypatch.setattr(local_module, "STOP_SECONDS", 0.2)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  no event tells of all that is waited for
            await asyncio.sleep(0.005)


async def ready_process(supervisor: Supervisor) -> int:
    """Load the model; its worker's process."""
    supervisor.wake()
    await until(lambda: supervisor.state == "ready")
    assert supervisor.process_id is not None
    return supervisor.process_id


def lives(process_id: int) -> bool:
    return psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE


def message_of(supervisor: Supervisor) -> str:
    return "" if supervisor.problem is None else supervisor.problem.message


def ask(supervisor: Supervisor, text: str = "hi", **fields: Any) -> AsyncGenerator[ChatEvent, None]:
    assert supervisor.endpoint is not None
    request = ChatRequest(request_id="r", model="m", messages=(Message(role="user", content=text),), **fields)
    return stream_chat(supervisor.endpoint.address, supervisor.endpoint.secret, request)


class FakeWorker(ServingWorker):
    """Its engine is what the test says."""

    def __init__(self, launcher: FakeLauncher) -> None:
        super().__init__()
        self._launcher = launcher

    async def ready(self, on_progress: Callable[[float], None]) -> Ready:
        for progress in self._launcher.progress:
            on_progress(progress)
            await asyncio.sleep(0.1)
        if self._launcher.load_error is not None:
            raise self._launcher.load_error
        return await self.listening()

    async def run(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        yield Accepted(1)
        while request.messages[0].content == "flood":
            yield AnswerText(0, "x" * 10_000)
        yield Completed(Usage(prompt_tokens=1, completion_tokens=1))

    def status(self) -> EngineStatus:
        return self._launcher.status()

    async def probe(self) -> None:
        self._launcher.probes += 1
        await self._launcher.probe()


class FakeLauncher:
    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.placements: list[Placement | None] = []
        self.load_error: GallamaError | None = None
        self.progress: Sequence[float] = ()
        self.status: Callable[[], EngineStatus] = lambda: EngineStatus(
            busy_slots=0, waiting=0, cached_tokens=0
        )
        self.probes = 0
        self.probe: Callable[[], Coroutine[Any, Any, None]] = self._make_a_token

    async def launch(self, _: ResolvedModel, placement: Placement | None = None) -> RunningWorker:
        self.placements.append(placement)
        self.workers.append(FakeWorker(self))
        return self.workers[-1]

    async def _make_a_token(self) -> None:
        pass


class TestLoading:
    async def test_a_model_is_loaded_when_it_is_wanted_and_not_before(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted())
        await asyncio.sleep(0.05)
        assert (supervisor.state, supervisor.starts, supervisor.process_id) == ("unloaded", 0, None)
        process_id = await ready_process(supervisor)
        assert supervisor.endpoint is not None
        assert supervisor.endpoint.context_length == 4096
        assert (supervisor.starts, supervisor.progress, supervisor.problem) == (1, 1.0, None)
        assert supervisor.ready_since is not None
        assert supervisor.memory_bytes > 1_000_000
        assert lives(process_id)

    async def test_progress_is_seen_while_the_model_loads(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted(seconds_to_load=1.5))
        supervisor.wake()
        seen = []

        def is_ready() -> bool:
            seen.append(supervisor.progress)
            return supervisor.state == "ready"

        await until(is_ready)
        assert seen == sorted(seen)
        assert len({progress for progress in seen if 0 < progress < 1}) >= 3
        assert seen[-1] == 1.0

    async def test_a_failed_load_is_told_with_the_workers_own_reason(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted(fail_at_load="The file is no model."))
        supervisor.wake()
        await asyncio.wait_for(supervisor.settled.wait(), 30)
        assert supervisor.state == "failed"
        assert "The file is no model." in message_of(supervisor)
        assert (supervisor.process_id, supervisor.memory_bytes, supervisor.progress) == (None, 0, 0.0)

    async def test_a_worker_that_dies_while_it_loads_is_told_with_how(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted(die_at_load=True))
        supervisor.wake()
        await until(lambda: supervisor.state == "failed")
        assert "ended with exit code 3 before its model was loaded" in message_of(supervisor)

    async def test_a_worker_that_says_nothing_while_it_loads_is_given_up(
        self, supervise: Supervise, fake_program: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor_module, "_SILENT_LOAD_SECONDS", 0.5)
        supervisor = supervise(fake_program("", is_ready=False), limits=OFTEN)
        supervisor.wake()
        await until(lambda: supervisor.state == "failed")
        assert "has said nothing for 1 s" in message_of(supervisor)
        assert supervisor.process_id is None

    async def test_a_long_load_that_goes_on_is_not_given_up(
        self, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor_module, "_SILENT_LOAD_SECONDS", 0.5)
        launcher = FakeLauncher()
        launcher.progress = [0.5] * 10
        limits = SupervisionLimits(probe_interval_seconds=60, hang_seconds=0.5)
        supervisor = supervise(scripted(), launcher, limits=limits)
        supervisor.wake()
        await asyncio.wait_for(supervisor.settled.wait(), 10)
        assert supervisor.state == "ready"

    async def test_its_gpus_are_chosen_at_each_start(self, supervise: Supervise) -> None:
        placements = iter([Placement(gpus=(0, 2)), Placement(gpus=(1,))])

        async def take_turns(_: ResolvedModel) -> Placement:
            return next(placements)

        launcher = FakeLauncher()
        supervisor = supervise(scripted(), launcher, place=take_turns)
        supervisor.wake()
        await until(lambda: supervisor.state == "ready")
        assert supervisor.gpus == (0, 2)
        launcher.workers[0].die()
        await until(lambda: supervisor.starts == 2)
        assert list(supervisor.gpus) == [1]
        assert launcher.placements == [Placement(gpus=(0, 2)), Placement(gpus=(1,))]

    async def test_a_place_that_cannot_be_had_is_why_the_load_failed(self, supervise: Supervise) -> None:
        async def refuse(_: ResolvedModel) -> Placement:
            raise InvalidConfig("There is no GPU 7.")

        supervisor = supervise(scripted(), FakeLauncher(), place=refuse)
        supervisor.wake()
        await until(lambda: supervisor.state == "failed")
        assert message_of(supervisor) == "There is no GPU 7."

    async def test_after_a_failed_load_a_wake_tries_again_when_its_delay_is_over(
        self, supervise: Supervise
    ) -> None:
        launcher = FakeLauncher()
        launcher.load_error = ModelLoadFailed("No memory.")
        supervisor = supervise(scripted(), launcher)
        supervisor.wake()
        await until(lambda: supervisor.state == "failed")
        launcher.load_error = None
        supervisor.wake()
        assert supervisor.state == "failed"
        await asyncio.sleep(Backoff.FIRST_SECONDS)
        supervisor.wake()
        await until(lambda: supervisor.state == "ready")


class TestUnloading:
    async def test_the_process_is_gone_and_its_memory_is_told(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted())
        process_id = await ready_process(supervisor)
        assert await supervisor.unload() > 1_000_000
        assert not lives(process_id)
        assert (supervisor.state, supervisor.endpoint, supervisor.process_id) == ("unloaded", None, None)
        assert (supervisor.memory_bytes, supervisor.status, supervisor.ready_since) == (0, None, None)

    async def test_the_next_wake_loads_anew(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted())
        await ready_process(supervisor)
        await supervisor.unload()
        await ready_process(supervisor)
        assert supervisor.starts == 2

    async def test_a_load_is_given_up_at_once(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted(seconds_to_load=1000))
        supervisor.wake()
        await until(lambda: supervisor.progress > 0 or supervisor.process_id is not None)
        process_id = supervisor.process_id
        assert process_id is not None
        await asyncio.wait_for(supervisor.unload(), 5)
        assert (supervisor.state, lives(process_id)) == ("unloaded", False)
        assert supervisor.settled.is_set()

    async def test_a_wake_is_taken_back_before_anything_has_begun(self, supervise: Supervise) -> None:
        launcher = FakeLauncher()
        supervisor = supervise(scripted(), launcher)
        await asyncio.sleep(0)
        supervisor.wake()
        assert await supervisor.unload() == 0
        await asyncio.sleep(0.05)
        assert (supervisor.state, launcher.workers) == ("unloaded", [])

    async def test_what_waits_to_be_started_again_is_not(
        self, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Backoff, "FIRST_SECONDS", 1000.0)
        launcher = FakeLauncher()
        supervisor = supervise(scripted(), launcher)
        supervisor.wake()
        await until(lambda: supervisor.state == "ready")
        launcher.workers[0].die()
        await until(lambda: supervisor.state == "restarting")
        await asyncio.wait_for(supervisor.unload(), 1)
        supervisor.wake()
        await until(lambda: supervisor.state == "ready")

    async def test_a_failed_load_is_forgotten(self, supervise: Supervise) -> None:
        launcher = FakeLauncher()
        launcher.load_error = ModelLoadFailed("No memory.")
        supervisor = supervise(scripted(), launcher)
        supervisor.wake()
        await until(lambda: supervisor.state == "failed")
        assert await supervisor.unload() == 0
        assert (supervisor.state, supervisor.problem) == ("unloaded", None)
        launcher.load_error = None
        supervisor.wake()
        await until(lambda: supervisor.state == "ready")

    async def test_it_goes_through_stopping_and_ends_for_all_who_ask(self, supervise: Supervise) -> None:
        states: list[InstanceState] = []
        supervisor: Supervisor
        supervisor = supervise(scripted(), on_change=lambda: states.append(supervisor.state))
        await ready_process(supervisor)
        await asyncio.gather(supervisor.unload(), supervisor.unload())
        assert states == ["starting", "ready", "stopping", "unloaded"]

    @pytest.mark.parametrize("turns", range(8))
    async def test_it_ends_whenever_it_comes_after_a_restart(self, supervise: Supervise, turns: int) -> None:
        unloads: list[asyncio.Task[int]] = []

        async def unload_later() -> int:
            for _ in range(turns):
                await asyncio.sleep(0)
            return await supervisor.unload()

        def on_change() -> None:
            if supervisor.state == "ready" and supervisor.starts == 2 and not unloads:
                unloads.append(asyncio.create_task(unload_later()))

        launcher = FakeLauncher()
        supervisor = supervise(scripted(), launcher, on_change=on_change)
        supervisor.wake()
        await until(lambda: supervisor.endpoint is not None)
        assert supervisor.endpoint is not None
        supervisor.suspect(supervisor.endpoint)
        launcher.workers[0].die()
        await until(lambda: bool(unloads))
        async with asyncio.timeout(5):
            await unloads[0]
        assert supervisor.state == "unloaded"

    async def test_a_sign_of_life_that_comes_too_late_does_not_stop_it(
        self, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unloads: list[asyncio.Task[int]] = []

        async def unload_meanwhile(work: Callable[[], int]) -> int:
            unloads.append(asyncio.create_task(supervisor.unload()))
            await asyncio.sleep(0)
            return work()

        monkeypatch.setattr(asyncio, "to_thread", unload_meanwhile)
        supervisor = supervise(scripted(), FakeLauncher(), limits=OFTEN)
        supervisor.wake()
        await until(lambda: bool(unloads))
        async with asyncio.timeout(5):
            await unloads[0]
        assert supervisor.state == "unloaded"

    async def test_it_goes_on_when_nobody_waits_for_it(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted())
        process_id = await ready_process(supervisor)
        unloading = asyncio.create_task(supervisor.unload())
        await asyncio.sleep(0)
        unloading.cancel()
        await until(lambda: supervisor.state == "unloaded")
        assert not lives(process_id)

    async def test_a_process_that_does_not_listen_is_killed(
        self, supervise: Supervise, fake_program: Any
    ) -> None:
        supervisor = supervise(fake_program("signal.signal(signal.SIGTERM, signal.SIG_IGN)"))
        process_id = await ready_process(supervisor)
        await asyncio.wait_for(supervisor.unload(), 10)
        assert not lives(process_id)

    async def test_a_stopped_process_is_ended_too_when_supervision_ends(self) -> None:
        supervisor = Supervisor(scripted(), LocalLauncher(), lambda: None, limits=SELDOM)
        run = asyncio.create_task(supervisor.run())
        process_id = await ready_process(supervisor)
        os.kill(process_id, signal.SIGSTOP)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        assert (supervisor.state, lives(process_id)) == ("unloaded", False)

    async def test_a_second_cancellation_leaves_no_process(self) -> None:
        supervisor = Supervisor(scripted(), LocalLauncher(), lambda: None, limits=SELDOM)
        run = asyncio.create_task(supervisor.run())
        process_id = await ready_process(supervisor)
        os.kill(process_id, signal.SIGSTOP)
        for _ in range(2):
            run.cancel()
            await asyncio.sleep(0.01)
        await until(lambda: not lives(process_id))
        await asyncio.gather(run, return_exceptions=True)


class TestChildren:
    """What a worker has started, as the process that compiles constraints, ends with it."""

    BREED = 'print(subprocess.Popen(["sleep", "1000"]).pid, file=sys.stderr, flush=True)'

    async def children_of(self, process_id: int) -> list[int]:
        await until(lambda: bool(psutil.Process(process_id).children()))
        return [child.pid for child in psutil.Process(process_id).children()]

    async def test_when_the_worker_is_unloaded(self, supervise: Supervise, fake_program: Any) -> None:
        supervisor = supervise(fake_program(self.BREED))
        (child,) = await self.children_of(await ready_process(supervisor))
        await supervisor.unload()
        await until(lambda: not lives(child))

    async def test_when_the_worker_was_killed(self, supervise: Supervise, fake_program: Any) -> None:
        supervisor = supervise(fake_program(self.BREED))
        process_id = await ready_process(supervisor)
        (child,) = await self.children_of(process_id)
        os.kill(process_id, signal.SIGKILL)
        await until(lambda: not lives(child))


class TestDeath:
    async def test_a_worker_that_was_killed_is_started_again(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted())
        process_id = await ready_process(supervisor)
        os.kill(process_id, signal.SIGKILL)
        await until(lambda: supervisor.state == "restarting")
        assert message_of(supervisor) == "The worker of m was killed by SIGKILL."
        assert await ready_process(supervisor) != process_id
        assert supervisor.starts == 2

    async def test_a_broken_connection_does_not_condemn_a_living_worker(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted())
        process_id = await ready_process(supervisor)
        assert supervisor.endpoint is not None
        supervisor.suspect(supervisor.endpoint)
        assert supervisor.state == "restarting"
        await until(lambda: supervisor.state == "ready")
        assert (supervisor.process_id, supervisor.starts) == (process_id, 1)

    async def test_a_connection_of_an_earlier_run_says_nothing_of_this_one(
        self, supervise: Supervise
    ) -> None:
        launcher = FakeLauncher()
        supervisor = supervise(scripted(), launcher)
        supervisor.wake()
        await until(lambda: supervisor.state == "ready")
        earlier = supervisor.endpoint
        assert earlier is not None
        launcher.workers[0].die()
        await until(lambda: supervisor.starts == 2 and supervisor.state == "ready")
        supervisor.suspect(earlier)
        assert supervisor.state == "ready"

    async def test_dying_again_and_again_is_a_crash_loop_that_is_left_alone_for_a_while(
        self, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(CrashCounter, "PAUSE_SECONDS", 0.3)
        monkeypatch.setattr(Backoff, "LONGEST_SECONDS", 0.05)
        launcher = FakeLauncher()

        async def die_at_once() -> None:
            if len(launcher.workers) <= CrashCounter.MOST_SHORT_RUNS:
                launcher.workers[-1].die()

        launcher.probe = die_at_once
        supervisor = supervise(
            scripted(), launcher, limits=SupervisionLimits(probe_interval_seconds=0.01, hang_seconds=60)
        )
        supervisor.wake()
        await until(lambda: supervisor.state == "failed")
        assert supervisor.problem is not None
        assert (supervisor.problem.status, supervisor.problem.code) == (503, "crash_loop")
        assert "5 times within" in message_of(supervisor)
        assert "killed by SIGKILL" in message_of(supervisor)
        supervisor.wake()
        assert supervisor.state == "failed"
        await asyncio.sleep(0.3)
        supervisor.wake()
        await until(lambda: supervisor.state == "ready")


class TestHanging:
    """Each is noticed, and another worker takes its place."""

    async def is_replaced(self, supervisor: Supervisor, because: str) -> None:
        problems: list[str] = []
        supervisor._on_change = lambda: problems.append(message_of(supervisor))
        process_id = await ready_process(supervisor)
        if because == "did not tell its status within 1 s":
            os.kill(process_id, signal.SIGSTOP)
        await until(lambda: any(because in problem for problem in problems))
        await until(lambda: supervisor.starts >= 2 and not lives(process_id))

    async def test_a_stopped_process(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted(), limits=OFTEN)
        await self.is_replaced(supervisor, "did not tell its status within 1 s")

    async def test_an_engine_that_makes_no_token(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted(hang_after_tokens=0), limits=OFTEN)
        await self.is_replaced(supervisor, "did not compute a token within 1 s")

    async def test_an_engine_that_fails_at_each_token(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted(raise_after_tokens=0), limits=OFTEN)
        await self.is_replaced(supervisor, "could not compute a token")

    async def test_a_frozen_event_loop(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted(freeze_after_tokens=0), limits=OFTEN)
        await self.is_replaced(supervisor, "did not compute a token within 1 s")

    async def test_a_worker_that_takes_connections_and_says_nothing(
        self, supervise: Supervise, fake_program: Any
    ) -> None:
        model = fake_program("")
        supervisor = supervise(model, limits=SupervisionLimits(probe_interval_seconds=0.1, hang_seconds=0.5))
        await self.is_replaced(supervisor, "did not tell its status within 0.5 s")

    async def test_a_worker_that_answers_garbage(self, supervise: Supervise, fake_program: Any) -> None:
        model = fake_program("while True:\n    listener.accept()[0].sendall(bytes(range(256)) * 99)")
        await self.is_replaced(supervise(model, limits=OFTEN), "cannot be reached")

    async def test_a_worker_that_hangs_up_on_everybody(self, supervise: Supervise, fake_program: Any) -> None:
        model = fake_program("while True:\n    listener.accept()[0].close()")
        await self.is_replaced(supervise(model, limits=OFTEN), "cannot be reached")

    async def test_an_answer_that_does_not_go_on(self, supervise: Supervise) -> None:
        supervisor = supervise(scripted(hang_after_tokens=1), limits=OFTEN, is_busy=lambda: True)
        process_id = await ready_process(supervisor)
        with pytest.raises(ConnectionError):
            async with aclosing(ask(supervisor)) as events:
                _ = [event async for event in events]
        assert "made no progress with its requests for" in message_of(supervisor)
        await until(lambda: supervisor.starts == 2 and not lives(process_id))


class TestSignsOfLife:
    async def test_an_idle_engine_is_asked_for_a_token(self, supervise: Supervise) -> None:
        launcher = FakeLauncher()
        supervisor = supervise(scripted(), launcher, limits=OFTEN)
        supervisor.wake()
        await until(lambda: launcher.probes >= 2)
        assert supervisor.starts == 1

    async def test_a_worker_that_has_requests_is_not(self, supervise: Supervise) -> None:
        launcher = FakeLauncher()
        supervisor = supervise(scripted(), launcher, limits=OFTEN, is_busy=lambda: True)
        supervisor.wake()
        await until(lambda: supervisor.status is not None)
        await asyncio.sleep(0.3)
        assert (launcher.probes, supervisor.starts, supervisor.state) == (0, 1, "ready")

    async def test_what_was_computed_since_the_last_time_is_sign_enough(self, supervise: Supervise) -> None:
        launcher = FakeLauncher()
        steps = count(1)
        launcher.status = lambda: EngineStatus(busy_slots=0, waiting=0, cached_tokens=0, steps=next(steps))
        supervisor = supervise(scripted(), launcher, limits=OFTEN)
        supervisor.wake()
        await until(lambda: supervisor.status is not None and supervisor.status.steps > 3)
        assert launcher.probes == 0

    async def test_a_request_that_is_not_with_the_engine_yet_need_not_go_on(
        self, supervise: Supervise
    ) -> None:
        limits = SupervisionLimits(probe_interval_seconds=0.05, hang_seconds=0.2)
        supervisor = supervise(scripted(), FakeLauncher(), limits=limits, is_busy=lambda: True)
        supervisor.wake()
        await asyncio.sleep(0.6)
        assert (supervisor.state, supervisor.starts) == ("ready", 1)

    async def test_a_slow_answer_that_goes_on_is_left_in_peace(self, supervise: Supervise) -> None:
        model = scripted(reply="abcdefgh", seconds_per_token=0.4)
        supervisor = supervise(model, limits=OFTEN, is_busy=lambda: True)
        await ready_process(supervisor)
        async with aclosing(ask(supervisor)) as events:
            texts = [event.text async for event in events if isinstance(event, AnswerText)]
        assert ("".join(texts), supervisor.starts) == ("abcdefgh", 1)
        assert supervisor.status is not None
        assert supervisor.status.steps > 0

    async def test_a_client_that_does_not_read_is_no_fault_of_the_engine(self, supervise: Supervise) -> None:
        launcher = FakeLauncher()
        launcher.status = lambda: EngineStatus(busy_slots=1, waiting=0, cached_tokens=0)
        limits = SupervisionLimits(probe_interval_seconds=0.05, hang_seconds=1.0)
        supervisor = supervise(scripted(), launcher, limits=limits, is_busy=lambda: True)
        supervisor.wake()
        await until(lambda: supervisor.state == "ready")
        async with aclosing(ask(supervisor, "flood")) as events:
            await anext(events)
            await asyncio.sleep(1.5)
            assert (supervisor.state, supervisor.starts) == ("ready", 1)
        await until(lambda: supervisor.starts == 2)

    async def test_the_gateways_own_shortage_does_not_condemn_a_worker(
        self, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tries = 0

        async def too_many_open_files(_address: str, _secret: str) -> None:
            nonlocal tries
            tries += 1
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(supervisor_module, "ask_status", too_many_open_files)
        supervisor = supervise(scripted(), FakeLauncher(), limits=OFTEN)
        supervisor.wake()
        await until(lambda: tries >= 2)
        assert (supervisor.state, supervisor.starts) == ("ready", 1)


class TestCrashCounter:
    def test_runs_that_last_are_no_crash_loop(self) -> None:
        crashes = CrashCounter()
        for _ in range(100):
            crashes.count("m", CrashCounter.SHORT_RUN_SECONDS, "died")

    def test_a_longer_run_makes_it_count_anew(self) -> None:
        crashes = CrashCounter()
        for ran_seconds in [*[0.0] * 4, CrashCounter.SHORT_RUN_SECONDS, *[0.0] * 4]:
            crashes.count("m", ran_seconds, "died")

    def test_once_in_a_crash_loop_each_short_run_is_one_too_many(self) -> None:
        crashes = CrashCounter()
        for _ in range(4):
            crashes.count("m", 0.0, "died")
        for times in (5, 6):
            with pytest.raises(CrashLoop, match=f"{times} times"):
                crashes.count("m", 0.0, "died")


def test_a_worker_that_computes_has_longer_to_end_a_step_than_one_that_sleeps() -> None:
    def after(processor_seconds: float) -> WorkerStatus:
        return WorkerStatus(busy_slots=1, waiting=0, cached_tokens=0, processor_seconds=processor_seconds)

    assert patience(after(100), after(100), 60) == patience(after(100), after(111), 60) == 1
    assert patience(after(100), after(112), 60) == patience(after(0), after(480), 60) > 1


def test_the_limits_are_those_of_the_server() -> None:
    config = ServerConfig(probe_interval_seconds=3, hang_seconds=4)
    assert SupervisionLimits.of(config) == SupervisionLimits(probe_interval_seconds=3, hang_seconds=4)


def test_no_process_is_left_when_the_gateway_is_killed_while_it_supervises() -> None:
    code = (
        "import asyncio, pathlib\n"
        "from gallama.catalog import ResolvedModel\n"
        "from gallama.config import ModelSpec\n"
        "from gallama.pool.launchers.local import LocalLauncher\n"
        "from gallama.pool.supervisor import Supervisor\n"
        "async def main():\n"
        "    spec = ModelSpec(model_id='any', backend='scripted')\n"
        "    model = ResolvedModel(name='m', aliases=(), path=pathlib.Path('any'), spec=spec)\n"
        "    supervisor = Supervisor(model, LocalLauncher(), lambda: None)\n"
        "    run = asyncio.create_task(supervisor.run())\n"
        "    supervisor.wake()\n"
        "    await supervisor.settled.wait()\n"
        "    print(supervisor.process_id, flush=True)\n"
        "    await run\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        worker = psutil.Process(int(gateway.stdout.readline()))
        gateway.kill()
    assert worker.wait(timeout=10) is None or not worker.is_running()
