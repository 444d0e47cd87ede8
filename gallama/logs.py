"""Lines of the log: as text or as JSON, each with the id of the request that it tells of.

    2026-08-01 12:00:00,123 INFO [req-5f0c] gallama.api.request_log: model=mistral outcome=completed ...
    {"time": "2026-08-01T10:00:00.123Z", "level": "INFO", "request_id": "req-5f0c", "message": ..., ...}

Nothing that a client, a model or a worker says can begin a line of its own, or change the terminal.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from logging import _SysExcInfoType

LogFormat = Literal["text", "json"]

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")
"""The request that is being answered; "" outside of any."""

# What a record has before anybody adds to it.
_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id"}


def log_to_stderr(log_format: LogFormat, *, is_verbose: bool) -> None:
    """The only place that sets up logging. Other libraries report from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    handler.addFilter(_add_request_id)
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(handler)
    logging.getLogger("gallama").setLevel(logging.DEBUG if is_verbose else logging.INFO)


def _add_request_id(record: logging.LogRecord) -> bool:
    if not hasattr(record, "request_id"):
        record.request_id = current_request_id.get()
    return True


class TextLines(logging.Formatter):
    """Lines to read. A traceback follows on lines that are set in, as no first line is."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(request)s%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", "")
        record.request = f"[{request_id}] " if request_id else ""
        return printable(super().formatMessage(record))

    def formatException(self, ei: _SysExcInfoType) -> str:
        text = super().formatException(ei)
        return "\n".join("    " + printable(line) for line in text.splitlines())


class JsonLines(logging.Formatter):
    """Lines for programs: one object each, with what the logging call gave as `extra` beside the rest."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            line["request_id"] = request_id
        line |= {name: value for name, value in vars(record).items() if name not in _OWN_ATTRIBUTES | {*line}}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # Only ASCII: no reader takes U+2028 for the end of a line.
        return json.dumps(line, default=str)


def printable(text: str) -> str:
    r"""A text on one line that a terminal shows as it is: "a\nb" with the backslash written out."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
