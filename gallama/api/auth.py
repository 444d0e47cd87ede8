"""Who may ask: holders of a key, where keys are set; and no web page that found its way to this machine."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gallama.api.error_answers import error_answer
from gallama.errors import AuthenticationFailed, GallamaError, HostNotAllowed

_OPEN_PATHS = ("/health",)
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class KeyCheck:
    """ASGI middleware: only requests with one of the keys pass."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or not self._keys:
            await self._app(scope, receive, send)
            return
        try:
            self._check(_raw_headers(scope, b"authorization"))
        except AuthenticationFailed as error:
            await error_answer(error.report())(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, given: list[bytes]) -> None:
        """
        Raises:
            AuthenticationFailed: not exactly one header, or not one of our keys.
        """
        if len(given) != 1:
            raise AuthenticationFailed("Send one header `Authorization: Bearer KEY`.", code="missing_api_key")
        scheme, _, key = given[0].partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise AuthenticationFailed("Send the key as `Authorization: Bearer KEY`.", code="missing_api_key")
        # Every key is compared, each in constant time: how long it takes tells nothing about any of them.
        if sum(hmac.compare_digest(key.strip(), known) for known in self._keys) == 0:
            raise AuthenticationFailed("The API key is not one that this server knows.")


class LoopbackCheck:
    """ASGI middleware for a server that only this machine may reach.

    A web page can make its own name point to 127.0.0.1 (DNS rebinding) and then talk to us as to itself;
    the headers Host and Origin give it away.
    """

    def __init__(self, app: ASGIApp, *, host: str) -> None:
        self._app = app
        self._names = _LOOPBACK_NAMES | {host.lower()} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._names is None:
            await self._app(scope, receive, send)
            return
        try:
            self._check(Headers(scope=scope))
        except GallamaError as error:
            await error_answer(error.report())(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        """
        Raises:
            HostNotAllowed: the request was not meant for this machine, or comes from a foreign page.
        """
        if _host_name("//" + headers.get("host", "")) not in (self._names or ()):
            raise HostNotAllowed("The Host header does not name this machine.")
        origin = headers.get("origin")
        if origin is not None and _host_name(origin) not in (self._names or ()):
            raise HostNotAllowed("The Origin header names a foreign page.")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host_name(url: str) -> str | None:
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return None if parts.username is not None or parts.path.strip("/") else parts.hostname


def _raw_headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
