"""Small JSON calls to a running gateway. No proxy is used, no redirect followed: a key goes nowhere else."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gallama.errors import ErrorReport, GatewayUnreachable, InvalidConfig, ReportedError

_CONNECT_SECONDS = 10.0
_MAX_ANSWER_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayClient:
    """Where a gateway is, and the key that it is asked with. Each call has a connection of its own."""

    url: str
    """As in http://127.0.0.1:8000; what stands behind the host is put in front of each path."""
    api_key: str = field(default="", repr=False)
    """"" for a gateway without keys."""

    def get(self, path: str, *, key: str) -> dict[str, Any]:
        """
        Raises:
            GallamaError: as for `post`.
        """
        return self._ask("GET", path, None, key)

    def post(self, path: str, body: object, *, key: str) -> dict[str, Any]:
        """Send a value as JSON; takes as long as the gateway does to answer.

        Args:
            key: what a gateway's answer has; one without it comes from something else.

        Raises:
            InvalidConfig: the address is none, or the key cannot be sent.
            GatewayUnreachable: nothing answers there, or no gateway does.
            ReportedError: the gateway's own error.
        """
        return self._ask("POST", path, json.dumps(body).encode(), key)

    def _ask(self, method: str, path: str, body: bytes | None, key: str) -> dict[str, Any]:
        connection, prefix = self._connection()
        try:
            try:
                connection.connect()
            except (OSError, UnicodeError) as error:  # the latter for names that cannot be looked up
                raise GatewayUnreachable(f"No gateway answers at {self.url}: {_reason(error)}.") from None
            assert connection.sock is not None
            connection.sock.settimeout(None)  # unloading waits for running answers
            status, values = self._exchange(connection, method, prefix + path, body)
        finally:
            connection.close()
        return self._checked(status, values, key)

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> tuple[int, Any]:
        """The status of the answer, and what it says; None where that is no JSON."""
        try:
            connection.request(method, path, body, self._headers())
            answer = connection.getresponse()
            content = answer.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise GatewayUnreachable(f"The connection to {self.url} broke off: {_reason(error)}.") from None
        try:
            return answer.status, json.loads(content)
        except ValueError:
            return answer.status, None

    def _checked(self, status: int, values: Any, key: str) -> dict[str, Any]:
        error = values.get("error") if isinstance(values, dict) else None
        if status >= 300 and isinstance(error, dict) and isinstance(error.get("message"), str):
            raise ReportedError(_to_report(status, error))
        if status >= 300 or not isinstance(values, dict) or key not in values:
            raise GatewayUnreachable(f"What answers at {self.url}, with status {status}, is no gateway.")
        return values

    def _headers(self) -> dict[str, str | bytes]:
        headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if self.api_key:
            if not self.api_key.isprintable() or " " in self.api_key:
                raise InvalidConfig("The API key holds blanks or unprintable characters.")
            headers["Authorization"] = b"Bearer " + self.api_key.encode()
        return headers

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        """
        Raises:
            InvalidConfig: the address is none.
        """
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        is_plain = host is not None and parts.username is None and not parts.query and self.url.isprintable()
        if not is_plain or host is None or parts.scheme not in ("http", "https"):
            raise InvalidConfig(f"{self.url!r} is no address of a gateway; write it as http://HOST:PORT.")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(host, port, timeout=_CONNECT_SECONDS), parts.path.rstrip("/").removesuffix("/v1")


def _to_report(status: int, error: dict[str, Any]) -> ErrorReport:
    return ErrorReport(
        status=status,
        type=str(error.get("type")),
        code=str(error.get("code")),
        message=printable(error["message"]),
    )


def printable(text: str) -> str:
    """A text that cannot change the terminal; lines stay lines."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
