"""Who may ask: holders of a key, where keys are set; and no web page that found its way to this machine."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gallama.api.error_answers import error_answer
from gallama.api.keys import ANYBODY, Caller, KeyRing
from gallama.api.management_paths import MANAGEMENT_PATHS
from gallama.errors import AuthenticationFailed, ErrorReport, GallamaError, HostNotAllowed, NotAllowed

_READING = ("GET", "HEAD")
_PAGES = ("/", "/status")
"""What a browser shows, which can send a key only as the password of HTTP Basic."""
_ABOUT_ALL_MODELS = (*_PAGES, "/metrics")
_BASIC_CHALLENGE = 'Basic realm="gallama", charset="UTF-8"'
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class KeyCheck:
    """ASGI middleware: where there are keys, only requests with one of them pass, and only as far as that
    key reaches. Whose key it is stands in the scope's state as `caller`."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._keys.follow_file()
        try:
            caller = ANYBODY if self._keys.is_empty or is_health(scope) else self._authenticate(scope)
            if is_management(scope["path"]) and not self._keys.may_manage(caller):
                raise NotAllowed("This key may ask models, but not manage them: that takes an admin key.")
            if scope["path"] in _ABOUT_ALL_MODELS and caller.models is not None:
                raise NotAllowed("This key is for certain models, and this tells of all.")
        except GallamaError as error:
            await _refuse(scope, receive, send, error.report())
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)

    def _authenticate(self, scope: Scope) -> Caller:
        """
        Raises:
            AuthenticationFailed: not exactly one header, or not one of our keys.
        """
        given = _raw_headers(scope, b"authorization")
        if len(given) != 1:
            raise AuthenticationFailed("Send one header `Authorization: Bearer KEY`.", code="missing_api_key")
        scheme, _, credentials = given[0].partition(b" ")
        if _is_page(scope) and scheme.lower() == b"basic":
            key = _password(credentials.strip())
        else:
            key = credentials.strip() if scheme.lower() == b"bearer" else b""
        if not key:
            raise AuthenticationFailed("Send the key as `Authorization: Bearer KEY`.", code="missing_api_key")
        caller = self._keys.find(key)
        if caller is None:
            raise AuthenticationFailed("The API key is not one that this server knows.")
        return caller


class LimitCheck:
    """ASGI middleware behind `KeyCheck`: holds each key to its limits, where a request costs work. A request
    counts as running until its answer has ended or its client has left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READING or is_management(scope["path"]):
            await self._app(scope, receive, send)
            return
        account = scope["state"]["caller"].account

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(account.headers())
            await send(message)

        try:
            account.enter()
        except GallamaError as error:
            await error_answer(error.report())(scope, receive, send_with_limits)
            return
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            account.leave()


def is_health(scope: Scope) -> bool:
    """Whether a request asks no more than whether the server lives: open to all, even when it is full."""
    return scope["path"] == "/health" and scope["method"] in _READING


def is_management(path: str) -> bool:
    """Whether a path manages models, in whatever way it is written: the router knows only one way for each,
    so that this is true of more paths than it finds."""
    parts = [part for part in path.lower().split("/") if part not in ("", ".", "..")]
    while parts[:1] == ["v1"]:
        del parts[0]
    return bool(parts) and parts[0] in MANAGEMENT_PATHS


def _is_page(scope: Scope) -> bool:
    return scope["path"] in _PAGES and scope["method"] in _READING


def _password(credentials: bytes) -> bytes:
    """What stands behind the colon of HTTP Basic; b"" when that is not what it is."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


async def _refuse(scope: Scope, receive: Receive, send: Send, report: ErrorReport) -> None:
    answer = error_answer(report)
    if report.status == 401 and _is_page(scope):
        answer.headers.append("WWW-Authenticate", _BASIC_CHALLENGE)
    await answer(scope, receive, send)


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
