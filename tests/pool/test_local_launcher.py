"""Real worker processes, with the scripted engine."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gallama.catalog import ResolvedModel
from gallama.config import ModelSpec
from gallama.conversation import AnswerText, ChatRequest, Message
from gallama.errors import GallamaError, ModelLoadFailed
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


async def test_keys_do_not_reach_the_workers_environment(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GALLAMA_API_KEYS", "top-secret")
    worker = await launch()
    await worker.ready(ignore_progress)
    assert b"top-secret" not in environment_of(worker.process_id)
