"""A worker's side of the wire: answer each connection, and stop working when it hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Protocol

from gallama.conversation import ChatEvent, ChatRequest, Failure
from gallama.errors import ErrorReport, GallamaError
from gallama.generation import EngineStatus
from gallama.wire import (
    ChatCall,
    Link,
    StatusCall,
    TokenCall,
    UnaryCall,
    UnaryReply,
    UnaryRequest,
    WorkerStatus,
    listen,
    receive_call,
)

logger = logging.getLogger(__name__)

GREETING_SECONDS = 10.0
"""A connection that has not said what it wants by then is closed."""


class Runner(Protocol):
    """What answers requests."""

    def run(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """The events of an answer in text."""
        ...

    async def reply(self, request: UnaryRequest) -> UnaryReply:
        """What is answered all at once.

        Raises:
            GallamaError: the request is refused, or failed.
        """
        ...


class ConnectionAnswerer:
    """Answers connections with what one runner makes of their requests."""

    def __init__(
        self,
        runner: Runner,
        engine_status: Callable[[], EngineStatus],
        secret: str,
        probe: Callable[[], Awaitable[None]],
    ) -> None:
        self._runner = runner
        self._engine_status = engine_status
        self._probe = probe
        self._secret = secret
        self._slow_readers = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def answer(self, link: Link) -> None:
        """Answer one connection; ends, and frees what it used, when the other side hangs up."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer_call(link)
        except (ConnectionError, TimeoutError) as error:
            logger.debug("A connection ended early: %s", error)
        finally:
            link.close()
            self._tasks.discard(task)

    async def cancel_all(self) -> None:
        """End every answer that is still under way."""
        # Before Python 3.12 Server.wait_closed() does not wait for them.
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer_call(self, link: Link) -> None:
        async with asyncio.timeout(GREETING_SECONDS):
            call = await receive_call(link, self._secret)
        match call:
            case StatusCall():
                await link.send(self._status())
            case TokenCall():
                await _unless_hung_up(link, self._send_status_after_token(link))
            case ChatCall():
                await _unless_hung_up(link, self._send_events(link, call.request))
            case UnaryCall():
                await _unless_hung_up(link, self._send_reply(link, call.request))

    async def _send_events(self, link: Link, request: ChatRequest) -> None:
        async with aclosing(self._events(request)) as events:
            async for event in events:
                self._slow_readers += 1
                try:
                    await link.send(event)
                finally:
                    self._slow_readers -= 1

    async def _send_reply(self, link: Link, request: UnaryRequest) -> None:
        try:
            reply: UnaryReply | Failure = await self._runner.reply(request)
        except GallamaError as error:
            reply = Failure(error.report())
        except Exception:
            reply = _unexpected_failure(request.request_id)
        await link.send(reply)

    async def _send_status_after_token(self, link: Link) -> None:
        try:
            await self._probe()
        except GallamaError as error:
            await link.send(Failure(error.report()))
        except Exception:
            logger.exception("The engine cannot compute a token.")
            await link.send(Failure(_unexpected_error("for a token")))
        else:
            await link.send(self._status())

    async def _events(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """The runner's events, and every error as one Failure at the end."""
        try:
            async with aclosing(self._runner.run(request)) as events:
                async for event in events:
                    yield event
        except GallamaError as error:
            yield Failure(error.report())
        except Exception:
            yield _unexpected_failure(request.request_id)

    def _status(self) -> WorkerStatus:
        status = dataclasses.asdict(self._engine_status())
        return WorkerStatus(**status, slow_readers=self._slow_readers, processor_seconds=time.process_time())


async def _nothing_to_probe() -> None:
    pass


@contextlib.asynccontextmanager
async def serving(
    address: str,
    secret: str,
    runner: Runner,
    engine_status: Callable[[], EngineStatus],
    probe: Callable[[], Awaitable[None]] = _nothing_to_probe,
) -> AsyncIterator[str]:
    """Answer connections inside the context; gives the address where it listens.

    Args:
        probe: as `Engine.probe`; for a runner without an engine there is nothing to do.

    Raises:
        OSError: the address cannot be had.
    """
    answerer = ConnectionAnswerer(runner, engine_status, secret, probe)
    server, actual_address = await listen(address, answerer.answer)
    try:
        yield actual_address
    finally:
        server.close()
        await answerer.cancel_all()


async def _unless_hung_up(link: Link, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, but give it up as soon as the other side hangs up."""
    working = asyncio.create_task(work)
    hanging_up = asyncio.create_task(link.hung_up())
    try:
        await asyncio.wait({working, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        hanging_up.cancel()
        await asyncio.gather(working, hanging_up, return_exceptions=True)


def _unexpected_failure(request_id: str) -> Failure:
    """The process boundary: whatever broke, this client hears of it and the worker lives on."""
    logger.exception("Request %s ended in an unexpected error.", request_id)
    return Failure(_unexpected_error(request_id))


def _unexpected_error(request_id: str) -> ErrorReport:
    return ErrorReport(
        status=500,
        type="server_error",
        code="internal_error",
        message=f"The worker failed on request {request_id}; its log says why.",
    )
