"""The door: how many connections may be open, and how long a client may keep one waiting.

A client that neither asks nor leaves, reads nothing, or sends a byte now and then costs a connection. Each is
given a time for what it owes; `watch_connections` looks who is late.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection
from http import HTTPStatus

import h11
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gallama.api.auth import is_health
from gallama.api.error_answers import error_answer
from gallama.errors import GallamaError, InvalidRequest, RequestTimeout, ServerFull

HEAD_SECONDS = 20.0
"""From connecting, or from the first byte of a later request, to the end of its headers."""
SURPLUS_HEAD_SECONDS = 5.0
"""The same for a connection beyond the limit."""
IDLE_SECONDS = 75
"""How long a connection may wait for its next request: longer than clients keep one that they do not use, of
which many ask again after 5 s or 60 s, and would find it closed in that very moment."""
LINGER_SECONDS = 10.0
"""How long the rest of a body is thrown away whose request was answered already: a client that is cut off
while it sends may never read the answer."""
UNREAD_SECONDS = 10.0
"""How long a connection that is to be closed may stay, of whose last bytes the client takes nothing."""
SPARE_CONNECTIONS = 64
"""Connections beyond the limit that may still ask whether the server lives; others hear at once that it is
full."""
LOOK_SECONDS = 1.0
MAX_HEAD_BYTES = 16 * 1024
"""Of headers, and the same of trailers; up to a slice more may pass."""
SLICE_BYTES = 4 * 1024

_RETRY_SECONDS = 1
_SURPLUS = "is_surplus"


class GatewayProtocol(H11Protocol):
    """One connection."""

    max_connections: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._owing_since: float | None = self.loop.time()
        self._unsent_bytes = 0
        self._unsent_since = 0.0
        self._is_surplus = len(self.connections) > self.max_connections
        if len(self.connections) > self.max_connections + SPARE_CONNECTIONS:
            self._answer_and_close(_full())
        elif self._is_surplus:
            self.app_state = {**self.app_state, _SURPLUS: True}

    def data_received(self, data: bytes) -> None:
        # The parser bounds only headers of which a part is missing: whole ones that come in one go it would
        # take at any length.
        for start in range(0, len(data), SLICE_BYTES):
            super().data_received(data[start : start + SLICE_BYTES])
            if self.transport.is_closing():
                return
        if not self._owes():
            self._owing_since = None
        elif self._owing_since is None:
            self._owing_since = self.loop.time()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._owing_since = self.loop.time() if self._owes_body() else None

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, in our form; and it survives that an answer is under way already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer_and_close(
                InvalidRequest(
                    f"This is not valid HTTP/1.1, or has headers of more than {MAX_HEAD_BYTES} bytes.",
                    code="invalid_http",
                )
            )
        else:
            self.transport.close()

    def look(self, now: float) -> None:
        """End the connection if its client is late with what it owes.

        Args:
            now: by the clock of the event loop.
        """
        if self.transport.is_closing():
            self._abort_if_unread(now)
        elif self._owing_since is not None and now - self._owing_since >= self._patience():
            self._close_late()

    def _owes(self) -> bool:
        return self.conn.their_state is h11.IDLE or self._owes_body()

    def _owes_body(self) -> bool:
        """Whether a request was answered before all of it had come."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _patience(self) -> float:
        if self._owes_body():
            return LINGER_SECONDS
        return SURPLUS_HEAD_SECONDS if self._is_surplus else HEAD_SECONDS

    def _close_late(self) -> None:
        has_begun_a_head = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        if has_begun_a_head:
            self._answer_and_close(RequestTimeout("The headers of the request did not come in time."))
        else:
            self.transport.close()

    def _abort_if_unread(self, now: float) -> None:
        unsent_bytes = self.transport.get_write_buffer_size()
        if unsent_bytes != self._unsent_bytes or self._unsent_since == 0:
            self._unsent_bytes, self._unsent_since = unsent_bytes, now
        elif now - self._unsent_since >= UNREAD_SECONDS:
            self.transport.abort()

    def _answer_and_close(self, error: GallamaError) -> None:
        """Answer without the application. Where that is at work, it learns that its client has left."""
        self.transport.write(_raw_answer(error))
        self.transport.close()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()


def protocol_for(max_connections: int) -> type[GatewayProtocol]:
    """The class that uvicorn makes connections of."""
    return type("LimitedProtocol", (GatewayProtocol,), {"max_connections": max_connections})


async def watch_connections(connections: Collection[object]) -> None:
    """Look after the connections of a server for as long as it runs."""
    clock = asyncio.get_running_loop().time
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        for connection in list(connections):
            assert isinstance(connection, GatewayProtocol)
            connection.look(clock())


class SurplusCheck:
    """ASGI middleware: a connection beyond the limit may ask, once, whether the server lives."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _SURPLUS not in scope.get("state", {}):
            await self._app(scope, receive, send)
            return

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        app = self._app if is_health(scope) else error_answer(_full().report())
        await app(scope, receive, send_last)


def _full() -> ServerFull:
    return ServerFull(
        "The server has as many connections as it may have; try again soon.",
        retry_after_seconds=_RETRY_SECONDS,
    )


def _raw_answer(error: GallamaError) -> bytes:
    answer = error_answer(error.report())
    headers = {
        **answer.headers,
        "x-request-id": f"req-{secrets.token_hex(12)}",
        "connection": "close",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    status = HTTPStatus(answer.status_code)
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode() + bytes(answer.body)
