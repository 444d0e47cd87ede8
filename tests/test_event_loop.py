from __future__ import annotations

import asyncio

import pytest

from gallama import event_loop


async def sleep_and_return(value: int) -> int:
    await asyncio.sleep(0)
    return value


def test_the_result_is_returned() -> None:
    assert event_loop.run(sleep_and_return(7)) == 7


def test_an_error_is_raised() -> None:
    async def fail() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        event_loop.run(fail())


def test_uvloop_is_used_where_it_is_installed() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def loop_type() -> type:
        return type(asyncio.get_running_loop())

    assert event_loop.run(loop_type()) is uvloop.Loop
