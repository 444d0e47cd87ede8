from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from gallama.interleave import interleaved


class Source:
    """A stream of (name, number), with a random pause before each."""

    def __init__(self, name: str, count: int, *, fails_after: int | None = None) -> None:
        self.name = name
        self.given = 0
        self.is_closed = False
        self._count = count
        self._fails_after = fails_after
        self._rng = random.Random(name)

    async def items(self) -> AsyncGenerator[tuple[str, int], None]:
        try:
            for number in range(self._count):
                await asyncio.sleep(self._rng.choice([0, 0, 0.001]))
                if number == self._fails_after:
                    raise ValueError(self.name)
                self.given += 1
                yield self.name, number
        finally:
            self.is_closed = True


def others() -> set[asyncio.Task[object]]:
    """Tasks beside the test itself."""
    return asyncio.all_tasks() - {task for task in [asyncio.current_task()] if task is not None}


async def collect(sources: list[Source]) -> list[tuple[str, int]]:
    async with aclosing(interleaved([source.items() for source in sources])) as items:
        return [item async for item in items]


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_all_items_come_and_each_stream_keeps_its_order(count: int) -> None:
    sources = [Source(str(number), count=10 * number) for number in range(count)]
    items = await collect(sources)
    for source in sources:
        assert [number for name, number in items if name == source.name] == list(range(10 * int(source.name)))
    assert all(source.is_closed for source in sources)
    assert not others()


async def test_streams_run_side_by_side() -> None:
    names = [name for name, _ in await collect([Source("a", 20), Source("b", 20)])]
    assert names not in (sorted(names), sorted(names, reverse=True))


@pytest.mark.parametrize("count", [1, 3])
async def test_the_first_error_ends_all(count: int) -> None:
    endless = [Source(str(number), 10**6) for number in range(count - 1)]
    with pytest.raises(ValueError, match="broken"):
        await collect([*endless, Source("broken", 10, fails_after=3)])
    assert all(source.is_closed for source in endless)
    assert not others()


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_closes_all(count: int) -> None:
    sources = [Source(str(number), 10**6) for number in range(count)]
    items = interleaved([source.items() for source in sources])
    for _ in range(5):
        await anext(items)
    await items.aclose()
    assert all(source.is_closed for source in sources if source.given)
    assert not others()


@pytest.mark.parametrize("count", [1, 3])
async def test_cancelling_the_reader_closes_all(count: int) -> None:
    sources = [Source(str(number), 10**6) for number in range(count)]
    reading = asyncio.create_task(collect(sources))
    await asyncio.sleep(0.02)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert all(source.is_closed for source in sources)
    assert not others()


async def test_nobody_works_ahead_of_a_slow_reader() -> None:
    sources = [Source(str(number), 1000) for number in range(3)]
    async with aclosing(interleaved([source.items() for source in sources])) as items:
        await anext(items)
        await asyncio.sleep(0.05)
        assert sum(source.given for source in sources) <= 1 + 1 + len(sources)


async def test_no_streams_have_no_items() -> None:
    assert await collect([]) == []


async def test_no_more_streams_run_at_once_than_may() -> None:
    sources = [Source(str(number), 20) for number in range(7)]
    began, most = set(), 0
    async with aclosing(interleaved([source.items() for source in sources], at_once=3)) as items:
        async for name, _ in items:
            began.add(name)
            running = sum(bool(source.given) and not source.is_closed for source in sources)
            most = max(most, running)
    assert len(began) == 7
    assert most == 3
    assert not others()


async def test_closing_ends_those_that_wait_for_their_turn() -> None:
    sources = [Source(str(number), 10**6) for number in range(5)]
    items = interleaved([source.items() for source in sources], at_once=2)
    await anext(items)
    await items.aclose()
    assert sum(bool(source.given) for source in sources) <= 2
    assert not others()
