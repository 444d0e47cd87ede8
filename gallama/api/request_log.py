"""One line of the log for each request that has ended, without its text and without its key."""

from __future__ import annotations

import logging
import re

from gallama.pool.ticket import RequestRecord

logger = logging.getLogger(__name__)

_WORD = re.compile(r"[\w./:-]+")


def log_request(record: RequestRecord) -> None:
    """
    Where lines are JSON, the figures are also fields of their own: "model", "outcome", "prompt_tokens", ...
    """
    figures = {
        "operation": record.operation,
        "model": record.model,
        "instance": record.instance,
        "outcome": record.outcome,
        "code": record.error_code,
        "tries": record.tries,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "queue_seconds": round(record.queue_seconds, 4),
        "first_token_seconds": _rounded(record.first_token_seconds),
        "seconds": round(record.seconds, 4),
    }
    told = " ".join(f"{name}={_shown(value)}" for name, value in figures.items() if value not in (None, ""))
    logger.info("%s", told, extra=figures | {"request_id": record.request_id})


def _shown(value: object) -> str:
    """As it is where it is one word; else quoted, so that no name passes for another figure."""
    text = str(value)
    return text if _WORD.fullmatch(text) else repr(text)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
