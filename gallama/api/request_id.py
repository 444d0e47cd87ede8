"""The id of a request, in its answer and in every line of the log: the client's own if sane, or a new one."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gallama.logs import current_request_id

logger = logging.getLogger(__name__)

_POLLED_PATHS = ("/health", "/ready")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id_of(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


class RequestIds:
    """ASGI middleware: gives each request its id, and logs how it was answered, without its text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _choose_id(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        token = current_request_id.set(request_id)
        began = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            is_quiet = status < 400 or scope["path"] in _POLLED_PATHS
            level = logging.DEBUG if is_quiet else logging.INFO
            seconds = time.monotonic() - began
            logger.log(level, "%s %r %d %.3f s", scope["method"], scope["path"], status, seconds)
            current_request_id.reset(token)


def _choose_id(asked: str) -> str:
    return asked if _SANE_ID.fullmatch(asked) else f"req-{secrets.token_hex(12)}"
