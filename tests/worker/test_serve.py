from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from gallama import wire
from gallama.conversation import (
    Accepted,
    AnswerText,
    ChatEvent,
    ChatRequest,
    Completed,
    Failure,
    Message,
    Usage,
)
from gallama.embedding import Embeddings, EmbedRequest
from gallama.errors import ContextLengthExceeded, GallamaError, ReportedError
from gallama.generation import EngineStatus
from gallama.wire import (
    Hello,
    TokenCall,
    UnaryReply,
    UnaryRequest,
    WorkerStatus,
    ask_for_token,
    ask_status,
    connect,
    stream_chat,
)
from gallama.worker import serve
from gallama.worker.serve import serving

ADDRESS = "tcp:127.0.0.1:0"
SECRET = "secret"
VECTOR = Embeddings(vectors=(b"1234",), prompt_tokens=2)
DONE = Completed(Usage(prompt_tokens=1, completion_tokens=1))


class ScriptedRunner:
    """Does what the request's first message says."""

    def __init__(self) -> None:
        self.running = 0
        self.ended = asyncio.Event()

    def status(self) -> EngineStatus:
        return EngineStatus(
            busy_slots=self.running,
            waiting=0,
            cached_tokens=5,
            sampled_tokens=6,
            forced_tokens=7,
            drafted_tokens=8,
            accepted_draft_tokens=9,
        )

    async def run(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        task = request.messages[0].content
        self.running += 1
        try:
            if task == "refuse":
                raise ContextLengthExceeded("Too long.")
            if task == "wait before accepting":
                await asyncio.Event().wait()
            yield Accepted(1)
            if task == "break":
                raise ZeroDivisionError("private text")
            if task == "wait":
                await asyncio.Event().wait()
            while task == "flood":
                yield AnswerText(0, "x" * 10_000)
            yield DONE
        finally:
            self.running -= 1
            self.ended.set()

    async def reply(self, request: UnaryRequest) -> UnaryReply:
        assert isinstance(request, EmbedRequest)
        self.running += 1
        try:
            match request.inputs[0]:
                case "refuse":
                    raise ContextLengthExceeded("Too long.")
                case "break":
                    raise ZeroDivisionError("private text")
                case "wait":
                    await asyncio.Event().wait()
            return VECTOR
        finally:
            self.running -= 1
            self.ended.set()


def embed(address: str, task: str) -> Coroutine[Any, Any, UnaryReply]:
    return wire.ask(address, SECRET, EmbedRequest(request_id="r-7", model="m", inputs=(task,)))


def ask(address: str, task: str) -> AsyncGenerator[ChatEvent, None]:
    request = ChatRequest(request_id="r-7", model="m", messages=(Message(role="user", content=task),))
    return stream_chat(address, SECRET, request)


async def collect(address: str, task: str) -> list[ChatEvent]:
    async with aclosing(ask(address, task)) as events:
        return [event async for event in events]


async def until_slow_readers(address: str, count: int) -> None:
    async with asyncio.timeout(5):
        while (await ask_status(address, SECRET)).slow_readers != count:  # noqa: ASYNC110  no event tells
            await asyncio.sleep(0.01)


async def test_events_of_the_runner_are_sent() -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        assert await collect(address, "answer") == [Accepted(1), DONE]


async def test_an_expected_error_is_a_failure_with_its_own_status() -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        (failure,) = await collect(address, "refuse")
    assert isinstance(failure, Failure)
    assert (failure.error.status, failure.error.code) == (400, "context_length_exceeded")


async def test_an_unexpected_error_is_a_failure_and_the_worker_lives_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = ScriptedRunner()
    with caplog.at_level(logging.ERROR):
        async with serving(ADDRESS, SECRET, runner, runner.status) as address:
            accepted, failure = await collect(address, "break")
            assert await collect(address, "answer") == [Accepted(1), DONE]
    assert accepted == Accepted(1)
    assert isinstance(failure, Failure)
    assert (failure.error.status, failure.error.code) == (500, "internal_error")
    assert "r-7" in failure.error.message
    assert "private text" not in failure.error.message
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("task", ["wait", "flood", "wait before accepting"])
async def test_hanging_up_ends_the_work_at_once(task: str) -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        asking = asyncio.create_task(collect(address, task))
        await asyncio.sleep(0.1)
        assert runner.running == 1
        asking.cancel()
        await asyncio.wait_for(runner.ended.wait(), 1)
        assert runner.running == 0
        assert await collect(address, "answer") == [Accepted(1), DONE]


async def test_ending_the_server_ends_running_work() -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        events = ask(address, "wait")
        await anext(events)
    assert runner.running == 0
    with pytest.raises(ConnectionError):
        await anext(events)


async def test_a_wrong_secret_starts_nothing() -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        with pytest.raises(ConnectionError):
            await ask_status(address, "wrong")
        assert await collect(address, "answer") == [Accepted(1), DONE]


async def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "GREETING_SECONDS", 0.1)
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        link = await connect(address)
        await asyncio.wait_for(link.hung_up(), 1)
        link.close()


async def test_status_is_told_while_work_goes_on() -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        events = ask(address, "wait")
        await anext(events)
        status = await ask_status(address, SECRET)
        assert status == WorkerStatus(
            processor_seconds=status.processor_seconds,
            busy_slots=1,
            waiting=0,
            cached_tokens=5,
            sampled_tokens=6,
            forced_tokens=7,
            drafted_tokens=8,
            accepted_draft_tokens=9,
        )
        assert status.processor_seconds > 0
        await events.aclose()


async def test_a_token_is_computed_before_the_status_is_told() -> None:
    runner = ScriptedRunner()
    computed = 0

    async def probe() -> None:
        nonlocal computed
        computed += 1

    async with serving(ADDRESS, SECRET, runner, runner.status, probe) as address:
        status = await ask_for_token(address, SECRET)
    assert (computed, status.cached_tokens) == (1, 5)


async def test_an_engine_that_computes_no_token_is_told_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = ScriptedRunner()
    errors: list[Exception] = [GallamaError("The GPU is lost."), ZeroDivisionError("private text")]

    async def probe() -> None:
        raise errors.pop(0)

    async with serving(ADDRESS, SECRET, runner, runner.status, probe) as address:
        with pytest.raises(ReportedError, match="The GPU is lost"):
            await ask_for_token(address, SECRET)
        with caplog.at_level(logging.ERROR), pytest.raises(ReportedError) as unexpected:
            await ask_for_token(address, SECRET)
    assert "private text" not in unexpected.value.message
    assert "ZeroDivisionError" in caplog.text


async def test_hanging_up_ends_the_work_on_a_token() -> None:
    runner = ScriptedRunner()
    has_begun, has_ended = asyncio.Event(), asyncio.Event()

    async def probe() -> None:
        has_begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            has_ended.set()

    async with serving(ADDRESS, SECRET, runner, runner.status, probe) as address:
        link = await connect(address)
        await link.send(Hello(SECRET))
        await link.send(TokenCall())
        await asyncio.wait_for(has_begun.wait(), 1)
        link.close()
        await asyncio.wait_for(has_ended.wait(), 1)


async def test_answers_that_wait_for_their_reader_are_counted() -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        events = ask(address, "flood")
        await anext(events)
        await until_slow_readers(address, 1)
        await events.aclose()
        await until_slow_readers(address, 0)


async def test_what_is_answered_at_once_is() -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        assert await embed(address, "any") == VECTOR


async def test_what_is_refused_at_once_is_so_with_its_own_status() -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        with pytest.raises(ReportedError) as error:
            await embed(address, "refuse")
    assert (error.value.report().status, error.value.report().code) == (400, "context_length_exceeded")


async def test_what_breaks_at_once_says_nothing_private_and_the_worker_lives_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = ScriptedRunner()
    with caplog.at_level(logging.ERROR):
        async with serving(ADDRESS, SECRET, runner, runner.status) as address:
            with pytest.raises(ReportedError) as error:
                await embed(address, "break")
            assert await embed(address, "any") == VECTOR
    assert error.value.report().code == "internal_error"
    assert "private" not in error.value.report().message


async def test_hanging_up_ends_what_would_be_answered_at_once() -> None:
    runner = ScriptedRunner()
    async with serving(ADDRESS, SECRET, runner, runner.status) as address:
        asking = asyncio.create_task(embed(address, "wait"))
        async with asyncio.timeout(5):
            while not runner.running:  # noqa: ASYNC110  no event tells
                await asyncio.sleep(0.01)
            asking.cancel()
            await runner.ended.wait()
        assert runner.running == 0
