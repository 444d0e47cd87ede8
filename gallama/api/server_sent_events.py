r"""A stream of server-sent events: one `data: {...}\n\n` for each chunk."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gallama.api.client_presence import cancel_all, client_left
from gallama.api.error_answers import error_body
from gallama.errors import GallamaError

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0
"""Proxies give up on a stream that is silent for long, as in a long prompt."""
UNREAD_SECONDS = 60.0
"""A client that takes nothing for so long, though it has not hung up, is left: others wait for its place."""

KEEP_ALIVE = "keep-alive"
# Where a reader of events sees the end of a line.
_LINE_END = re.compile(r"\r\n|\r|\n")
_LOOKS = 8
"""How often such a time is looked at while it passes."""
DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def to_event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


def to_text_event(text: str) -> bytes:
    """A text as it is; each of its lines is one of the event, whatever ended it before."""
    lines = _LINE_END.split(text)
    return b"".join(b"data: %b\n" % line.encode() for line in lines) + b"\n"


class Closable(Protocol):
    async def aclose(self) -> object: ...


class EventStream(Response):
    """Sends chunks as they come, then [DONE] or whatever else ends the stream.

    An error among them is sent as one `data: {"error": ...}`; then the connection ends without that and
    without the end of its body, so that no client takes what it has for a whole answer. When the client
    hangs up, or reads no more, the chunks' generator is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[Any, None],
        *,
        encode: Callable[[Any], bytes] = to_event,
        last: bytes = DONE,
        source: Closable | None = None,
        comment: Callable[[], str] = lambda: KEEP_ALIVE,
    ) -> None:
        """
        Args:
            encode: makes an event of a chunk.
            last: what is sent behind the last chunk.
            source: where the chunks come from; closed with them, also where none was ever taken.
            comment: one line to send when there has been nothing to send for a while.
        """
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._chunks = chunks
        self._encode = encode
        self._last = last
        self._source = source or chunks
        self._comment = comment
        self._last_sent = time.monotonic()
        """When something was last sent, or began to be: see `_is_sending`."""
        self._is_sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source), aclosing(self._chunks):
            writing = asyncio.create_task(self._write(send))
            watching = asyncio.create_task(self._watch(send))
            leaving = asyncio.create_task(client_left(receive))
            try:
                tasks = {writing, watching, leaving}
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            except _UnreadStream:
                logger.info("A stream ends: its client has read nothing for %.0f s.", UNREAD_SECONDS)
            finally:
                await cancel_all(writing, watching, leaving)

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await self._send(send, start)
        if (comment := self._comment()) != KEEP_ALIVE:
            await self._send(send, _body(_to_comment(comment)))
        try:
            async for chunk in self._chunks:
                await self._send(send, _body(self._encode(chunk)))
        except GallamaError as error:
            await self._send(send, _body(to_event(error_body(error.report()))))
            return
        await self._send(send, _body(self._last, more=False))

    async def _send(self, send: Send, message: Message) -> None:
        self._last_sent = time.monotonic()
        self._is_sending = True
        await send(message)
        self._is_sending = False

    async def _watch(self, send: Send) -> None:
        """Fill silence with comments. One watch for all chunks: a time limit for each costs more than it.

        Raises:
            _UnreadStream: what was sent is not being read.
        """
        while True:
            await asyncio.sleep(min(KEEP_ALIVE_SECONDS, UNREAD_SECONDS) / _LOOKS)
            seconds = time.monotonic() - self._last_sent
            if self._is_sending and seconds >= UNREAD_SECONDS:
                raise _UnreadStream
            if not self._is_sending and seconds >= KEEP_ALIVE_SECONDS:
                await self._keep_alive(send)

    async def _keep_alive(self, send: Send) -> None:
        try:
            async with asyncio.timeout(UNREAD_SECONDS):
                await self._send(send, _body(_to_comment(self._comment())))
        except TimeoutError:
            raise _UnreadStream from None


def _to_comment(line: str) -> bytes:
    return f": {line}\n\n".encode()


def _body(content: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


class _UnreadStream(Exception):
    """What was sent is not being read."""
