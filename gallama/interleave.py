"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def interleaved(
    streams: Sequence[AsyncGenerator[Item, None]], *, at_once: int | None = None
) -> AsyncGenerator[Item, None]:
    """The items of all streams as they come. The first error ends all; closing it closes all.

    Args:
        at_once: how many streams run at the same time; the others wait for their turn. None: all.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield item
        return
    # Room for one item: nobody works ahead of a slow reader.
    items: asyncio.Queue[Item | _Ended] = asyncio.Queue(maxsize=1)
    turns = asyncio.Semaphore(at_once or len(streams))
    tasks = [asyncio.create_task(_pump(stream, items, turns)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            received = await items.get()
            if not isinstance(received, _Ended):
                yield received
            elif received.error is not None:
                raise received.error
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Ended:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


async def _pump(
    stream: AsyncGenerator[Item, None], items: asyncio.Queue[Item | _Ended], turns: asyncio.Semaphore
) -> None:
    try:
        async with turns, aclosing(stream):
            async for item in stream:
                await items.put(item)
    except Exception as error:  # handed over to whoever reads, not lost in a task
        await items.put(_Ended(error))
    else:
        await items.put(_Ended())
