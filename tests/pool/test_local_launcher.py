"""Real worker processes, with the scripted engine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from gallama.catalog import ResolvedModel
from gallama.config import ModelSpec
from gallama.conversation import AnswerText, ChatRequest, Message
from gallama.errors import GallamaError, MissingExtra, ModelLoadFailed
from gallama.pool.gpus import Placement
from gallama.pool.launchers.local import LocalLauncher, LocalWorker
from gallama.wire import ask_status, stream_chat

Launch = Callable[..., Awaitable[LocalWorker]]


def scripted_model(arguments: dict[str, Any], **values: Any) -> ResolvedModel:
    spec = ModelSpec.model_validate(
        {"model_id": "any", "backend": "scripted", "backend_extra_args": arguments, **values}
    )
    return ResolvedModel(name="echo", aliases=(), path=Path("any"), spec=spec)


def ignore_progress(_: float) -> None:
    pass


@pytest.fixture
async def launch() -> AsyncIterator[Launch]:
    """Launches scripted workers, and stops them after the test."""
    workers = []

    async def launch_one(values: dict[str, Any] | None = None, **arguments: Any) -> LocalWorker:
        worker = await LocalLauncher().launch(scripted_model(arguments, **(values or {})))
        workers.append(worker)
        return worker

    yield launch_one
    for worker in workers:
        await worker.stop()


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def environment_of(process_id: int) -> bytes:
    file = Path(f"/proc/{process_id}/environ")
    if not file.exists():
        pytest.skip("needs /proc")
    return file.read_bytes()


async def test_a_worker_answers_and_is_gone_when_stopped(launch: Launch) -> None:
    worker = await launch()
    ready = await worker.ready(ignore_progress)
    request = ChatRequest(request_id="r", model="echo", messages=(Message(role="user", content="hi"),))
    events = [event async for event in stream_chat(ready.address, worker.secret, request)]
    assert "".join(event.text for event in events if isinstance(event, AnswerText)) == "hi"
    assert ready.context_length == 4096
    await worker.stop()
    assert not is_alive(worker.process_id)
    assert not Path(ready.address.removeprefix("unix:")).parent.exists()


async def test_only_who_knows_the_secret_and_only_this_user_can_connect(launch: Launch) -> None:
    worker = await launch()
    address = (await worker.ready(ignore_progress)).address
    folder = Path(address.removeprefix("unix:")).parent
    assert folder.stat().st_mode & 0o077 == 0
    with pytest.raises(ConnectionError):
        await ask_status(address, "guess")


async def test_the_reason_of_a_failed_load_is_the_workers_own(launch: Launch) -> None:
    worker = await launch(fail_at_load="The file is no model.")
    with pytest.raises(GallamaError) as failed:
        await worker.ready(ignore_progress)
    report = failed.value.report()
    assert (report.status, report.code) == (503, "model_load_failed")
    assert "The file is no model." in report.message


async def test_wrong_arguments_of_the_engine_are_named(launch: Launch) -> None:
    worker = await launch(no_such_argument=1)
    with pytest.raises(GallamaError, match="no_such_argument"):
        await worker.ready(ignore_progress)


async def test_a_worker_that_dies_while_it_loads_is_noticed_with_its_last_words(launch: Launch) -> None:
    worker = await launch(die_at_load=True)
    with pytest.raises(ModelLoadFailed, match="exit code 3"):
        await worker.ready(ignore_progress)


async def test_an_interpreter_that_does_not_exist_is_named() -> None:
    model = scripted_model({}, python="/nowhere/python")
    with pytest.raises(ModelLoadFailed, match="/nowhere/python"):
        await LocalLauncher().launch(model)


async def test_an_interpreter_that_is_too_old_is_told_from_a_worker_that_broke(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\necho 'Unknown option: -P' >&2\necho 'usage: python3.10 ...' >&2\nexit 2\n")
    old.chmod(0o755)
    worker = await LocalLauncher().launch(scripted_model({}, python=str(old)))
    with pytest.raises(ModelLoadFailed, match=r"is older than 3\.11, .* name another one .* `python`"):
        await worker.ready(ignore_progress)
    await worker.stop()


async def test_an_interpreter_without_gallama_runs_the_gateways_own(
    launch: Launch, embedding_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(msgspec.__file__).parent.parent))
    worker = await launch(values={"python": embedding_python})
    ready = await worker.ready(ignore_progress)
    request = ChatRequest(request_id="r", model="echo", messages=(Message(role="user", content="hi"),))
    events = [event async for event in stream_chat(ready.address, worker.secret, request)]
    assert "".join(event.text for event in events if isinstance(event, AnswerText)) == "hi"
    assert b"PYTHONPATH" not in environment_of(worker.process_id)


async def test_an_engine_that_is_nowhere_is_an_error_that_names_what_installs_it() -> None:
    spec = ModelSpec.model_validate({"model_id": "any", "backend": "embedding"})
    model = ResolvedModel(name="vectors", aliases=(), path=Path("any"), spec=spec)
    with pytest.raises(MissingExtra, match="`gallama setup embedding`"):
        await LocalLauncher().launch(model)


async def test_a_killed_worker_is_noticed_at_once(launch: Launch) -> None:
    worker = await launch()
    await worker.ready(ignore_progress)
    os.kill(worker.process_id, signal.SIGKILL)
    assert await asyncio.wait_for(worker.exited(), 2) == "was killed by SIGKILL"


async def test_stopping_ends_a_worker_that_is_still_loading(launch: Launch) -> None:
    worker = await launch(seconds_to_load=60)
    await asyncio.sleep(1)
    await asyncio.wait_for(worker.stop(), 3)
    assert not is_alive(worker.process_id)


async def test_stopping_ends_a_worker_that_is_stopped_itself(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gallama.pool.launchers.local.STOP_SECONDS", 0.2)
    worker = await launch()
    await worker.ready(ignore_progress)
    os.kill(worker.process_id, signal.SIGSTOP)
    await asyncio.wait_for(worker.stop(), 3)
    assert not is_alive(worker.process_id)


async def test_what_a_worker_logs_stands_in_the_log_with_its_name(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        worker = await launch(values={"python": None}, raise_after_tokens=0)
        ready = await worker.ready(ignore_progress)
        request = ChatRequest(request_id="r-9", model="echo", messages=(Message(role="user", content="hi"),))
        _ = [event async for event in stream_chat(ready.address, worker.secret, request)]
        await worker.stop()
    assert "[echo] " in caplog.text
    assert "r-9" in caplog.text


@pytest.mark.parametrize(
    "name", ["GALLAMA_API_KEY", "GALLAMA_API_KEYS", "GALLAMA_ADMIN_KEYS", "GALLAMA_KEYS_FILE"]
)
async def test_keys_do_not_reach_the_workers_environment(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "top-secret")
    worker = await launch()
    await worker.ready(ignore_progress)
    assert b"top-secret" not in environment_of(worker.process_id)


async def test_a_worker_sees_only_its_gpus_and_is_told_their_memory(tmp_path: Path) -> None:
    program, told = tmp_path / "python", tmp_path / "told.json"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\norder = json.loads(sys.stdin.readline())\n"
        f"json.dump([order, dict(os.environ)], open({str(told)!r}, 'w'))\n"
    )
    program.chmod(0o700)
    model = scripted_model({}, python=str(program), gpus=[20, 0, 10])
    placement = Placement(environment={"CUDA_VISIBLE_DEVICES": "0,2"}, split=(20.0, 10.0), gpus=(0, 2))
    worker = await LocalLauncher().launch(model, placement)
    await worker.exited()
    await worker.stop()
    order, environment = json.loads(told.read_text())
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert json.loads(order["spec"])["gpus"] == [20.0, 10.0]


async def test_progress_of_a_load_is_told_and_kept_within_bounds(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys, time\nsys.stdin.readline()\n"
        "for fraction in (0.25, -3, 7):\n"
        "    print(json.dumps({'type': 'Loading', 'fraction': fraction}), flush=True)\n"
        "print('no report', flush=True)\n"
        "print(json.dumps({'type': 'Ready', 'address': 'tcp::1', 'context_length': 9}), flush=True)\n"
        "time.sleep(1000)\n"
    )
    program.chmod(0o700)
    worker = await LocalLauncher().launch(scripted_model({}, python=str(program)))
    told: list[float] = []
    await worker.ready(told.append)
    await worker.stop()
    assert told == [0.25, 0.0, 1.0]


async def test_what_is_told_of_a_failure_cannot_forge_a_line(launch: Launch) -> None:
    worker = await launch(fail_at_load="bad\nERROR all is lost\x1b[2J")
    with pytest.raises(GallamaError) as failed:
        await worker.ready(ignore_progress)
    assert failed.value.message.isprintable()


async def test_a_launch_that_is_given_up_leaves_no_process_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(psutil.Process().children())
    for turns in range(8):
        launching = asyncio.create_task(LocalLauncher().launch(scripted_model({})))
        for _ in range(turns):
            await asyncio.sleep(0)
        launching.cancel()
        (worker,) = await asyncio.gather(launching, return_exceptions=True)
        if isinstance(worker, LocalWorker):
            await worker.stop()
    assert os.listdir(tmp_path) == []
    _, alive = psutil.wait_procs(set(psutil.Process().children()) - before, timeout=5)
    assert not alive


async def test_the_memory_of_a_worker_counts_what_it_has_started(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport subprocess, sys, time\nsys.stdin.readline()\n"
        "code = 'import time; held = bytes(range(256)) * 400_000; time.sleep(1000)'\n"
        "subprocess.Popen([sys.executable, '-c', code])\ntime.sleep(1000)\n"
    )
    program.chmod(0o700)
    worker = await LocalLauncher().launch(scripted_model({}, python=str(program)))
    async with asyncio.timeout(20):
        while worker.memory_bytes() < 100_000_000:  # noqa: ASYNC110  nothing tells that it has grown
            await asyncio.sleep(0.02)
    await worker.stop()
    assert worker.memory_bytes() == 0


async def test_who_gave_a_load_up_hears_no_more_of_it(launch: Launch) -> None:
    worker = await launch(seconds_to_load=60)
    told: list[float] = []
    waiting = asyncio.create_task(worker.ready(told.append))
    async with asyncio.timeout(20):
        while not told:  # noqa: ASYNC110  the worker tells of itself
            await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    count = len(told)
    await asyncio.sleep(1)
    assert len(told) == count
