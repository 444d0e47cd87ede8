r"""A stream of server-sent events: one `data: {...}\n\n` for each chunk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gallama.api.client_presence import cancel_all, client_left
from gallama.api.error_answers import error_body
from gallama.errors import GallamaError

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0
"""Proxies give up on a stream that is silent for long, as in a long prompt."""
UNREAD_SECONDS = 60.0
"""A client that takes nothing for so long, though it has not hung up, is left: others wait for its place."""

_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def to_event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


class EventStream(Response):
    """Sends chunks as they come, then [DONE].

    An error among them is sent as one `data: {"error": ...}`; then the connection ends without [DONE] and
    without the end of its body, so that no client takes what it has for a whole answer. When the client
    hangs up, or reads no more, the chunks' generator is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Mapping[str, Any], None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._chunks = chunks
        self._last_sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            writing = asyncio.create_task(self._write(send))
            keeping_alive = asyncio.create_task(self._keep_alive(send))
            leaving = asyncio.create_task(client_left(receive))
            try:
                tasks = {writing, keeping_alive, leaving}
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            except _UnreadStream:
                logger.info("A stream ends: its client has read nothing for %.0f s.", UNREAD_SECONDS)
            finally:
                await cancel_all(writing, keeping_alive, leaving)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await self._send_body(send, to_event(chunk))
        except GallamaError as error:
            await self._send_body(send, to_event(error_body(error.report())))
            return
        await self._send_body(send, _DONE, more=False)

    async def _keep_alive(self, send: Send) -> None:
        while True:
            silent_seconds = time.monotonic() - self._last_sent
            await asyncio.sleep(max(KEEP_ALIVE_SECONDS - silent_seconds, 0.01))
            if time.monotonic() - self._last_sent >= KEEP_ALIVE_SECONDS:
                await self._send_body(send, _KEEP_ALIVE)

    async def _send_body(self, send: Send, body: bytes, *, more: bool = True) -> None:
        self._last_sent = time.monotonic()
        try:
            async with asyncio.timeout(UNREAD_SECONDS):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise _UnreadStream from None


class _UnreadStream(Exception):
    """What was sent is not being read."""
