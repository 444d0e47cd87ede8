"""From an HTTP request to its ticket: until when it must have ended, and who pays for it."""

from __future__ import annotations

import math
import time

from starlette.requests import Request

from gallama.api.error_answers import shown
from gallama.api.keys import caller_of
from gallama.config.model_spec import ModelType
from gallama.errors import InvalidRequest
from gallama.pool.pool import WorkerPool
from gallama.pool.ticket import Ticket

TIMEOUT_HEADER = "x-request-timeout-seconds"
MAX_TIMEOUT_SECONDS = 86_400


def ticket_of(request: Request) -> Ticket:
    """A new ticket; the time that the client gives its request begins now.

    Raises:
        InvalidRequest: that time is no sane number.
    """
    caller = caller_of(request)
    return Ticket(deadline=_deadline(request), key_name=caller.name, on_end=caller.charge)


def model_to_ask(request: Request, name: str, model_type: ModelType | None) -> str:
    """The model of a type that answers to a name; None: of any type.

    Raises:
        ModelNotFound: none does.
        InvalidRequest: the model of the name is of another type.
        NotAllowed: the caller's key does not open it.
    """
    pool: WorkerPool = request.app.state.pool
    model = pool.identify(name, model_type).name
    check_may_ask(request, model)
    return model


def check_may_ask(request: Request, model: str) -> None:
    """
    Args:
        model: the name of a model that the pool has.

    Raises:
        NotAllowed: the caller's key does not open it.
    """
    caller = caller_of(request)
    if caller.models is not None:
        pool: WorkerPool = request.app.state.pool
        caller.check_model(pool.find(model))


def _deadline(request: Request) -> float | None:
    given = request.headers.getlist(TIMEOUT_HEADER)
    if not given:
        return None
    seconds = _to_number(given[0])
    if len(given) > 1 or not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise InvalidRequest(
            f"Send one header {TIMEOUT_HEADER} with a number above 0 and up to {MAX_TIMEOUT_SECONDS},"
            f" not {shown(', '.join(given))}.",
            param=TIMEOUT_HEADER,
        )
    return time.monotonic() + seconds


def _to_number(text: str) -> float:
    """NaN for what is no number."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan
