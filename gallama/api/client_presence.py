"""Work only as long as somebody waits for it: plain handlers are not cancelled when their client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from gallama.api.error_answers import ClientLeft

T = TypeVar("T")


async def client_left(receive: Receive) -> None:
    """Return once the client hangs up. To be used after the whole body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled as soon as the client hangs up.

    Raises:
        ClientLeft: the client hung up.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(client_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        await cancel_all(working, leaving)


async def cancel_all(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs, and wait until it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
