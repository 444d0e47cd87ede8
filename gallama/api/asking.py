"""Answers that are streamed: an error is a status as long as it can be, and a silent stream says why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from gallama.api.client_presence import cancel_all
from gallama.api.server_sent_events import KEEP_ALIVE
from gallama.conversation import ChatEvent, Failure
from gallama.errors import ReportedError
from gallama.pool.ticket import Ticket

PATIENCE_SECONDS = 2.0
"""A stream that is not accepted by then begins, with comments on its place in the line; what goes wrong after
that is an event of the stream, no status."""


class Asking:
    """A request that is under way. Whoever has it closes it."""

    def __init__(self, events: AsyncGenerator[ChatEvent, None]) -> None:
        self._events = events
        self._first = asyncio.create_task(anext(events))

    async def until_accepted(self, patience_seconds: float) -> None:
        """Wait for the first event, but not for ever: until it has come, an error can still be a status.

        Raises:
            GallamaError: the request was not accepted.
        """
        await asyncio.wait({self._first}, timeout=patience_seconds)
        if self._first.done() and isinstance(first := self._first.result(), Failure):
            raise ReportedError(first.error)

    async def events(self) -> AsyncGenerator[ChatEvent, None]:
        yield await self._first
        async for event in self._events:
            yield event

    async def aclose(self) -> None:
        await cancel_all(self._first)
        await self._events.aclose()


async def accepted(events: AsyncGenerator[ChatEvent, None]) -> Asking:
    """Begin to ask; closes the events where that fails.

    Raises:
        GallamaError: the request was refused.
    """
    asking = Asking(events)
    try:
        await asking.until_accepted(PATIENCE_SECONDS)
    except BaseException:
        await asking.aclose()
        raise
    return asking


def comment_on(tickets: Sequence[Ticket]) -> str:
    """What the client of a silent stream is told: the best place that one of its requests has in the line."""
    positions = [position for ticket in tickets if (position := ticket.position) is not None]
    return f"queue position {min(positions)}" if positions else KEEP_ALIVE
