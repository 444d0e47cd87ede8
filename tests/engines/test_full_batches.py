"""Batches are formed late and full, and no call keeps the others waiting."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from gallama.engines.full_batches import FullBatches


class Model:
    """Doubles numbers, a batch each time that it may."""

    def __init__(self, batch_size: int = 4, at_once: int = 1) -> None:
        self.batches = FullBatches(self._compute, batch_size=batch_size, at_once=at_once)
        self.begun: list[list[int]] = []
        self._may_end = asyncio.Semaphore(0)

    def call(self, *numbers: int) -> asyncio.Task[list[int]]:
        return asyncio.create_task(self.batches.compute(numbers))

    async def end_batch(self) -> None:
        """Let one batch end, and what follows from that happen."""
        self._may_end.release()
        await turns()

    async def _compute(self, numbers: list[int]) -> Sequence[int]:
        self.begun.append(numbers)
        await self._may_end.acquire()
        if -1 in numbers:
            raise ValueError("unlucky")
        return [2 * number for number in numbers]


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_each_call_gets_its_own_results_in_order() -> None:
    model = Model()
    one, other = model.call(3, 1, 2), model.call(5, 4)
    for _ in range(3):
        await model.end_batch()
    assert (await one, await other) == ([6, 2, 4], [10, 8])
    assert await model.batches.compute([]) == []


async def test_what_comes_while_a_batch_is_computed_makes_the_next_one() -> None:
    model = Model(batch_size=8)
    calls = [model.call(0)]
    await turns()
    calls += [model.call(number) for number in range(1, 6)]
    await turns()
    assert model.begun == [[0]]
    assert model.batches.waiting == 5
    await model.end_batch()
    assert model.begun == [[0], [1, 2, 3, 4, 5]]
    await model.end_batch()
    assert await asyncio.gather(*calls) == [[0], [2], [4], [6], [8], [10]]


async def test_a_full_batch_is_handed_over_early_but_only_one() -> None:
    model = Model()
    call = model.call(0)
    await turns()
    others = [model.call(number) for number in range(1, 10)]
    await turns()
    assert model.begun == [[0], [1, 2, 3, 4]]
    for _ in range(4):
        await model.end_batch()
    assert await asyncio.gather(call, *others) == [[2 * number] for number in range(10)]
    assert model.begun[2:] == [[5, 6, 7, 8], [9]]


async def test_as_many_batches_are_computed_at_the_same_time_as_may_be() -> None:
    model = Model(at_once=2)
    calls = [model.call(0)]
    await turns()
    calls.append(model.call(1))
    await turns()
    calls.append(model.call(2))
    await turns()
    assert model.begun == [[0], [1]]
    for _ in range(3):
        await model.end_batch()
    assert await asyncio.gather(*calls) == [[0], [2], [4]]


async def test_a_small_call_is_in_the_next_batch_although_a_large_one_came_before() -> None:
    model = Model(batch_size=8)
    large = model.call(*range(100, 200))
    await turns()
    small = model.call(1, 2)
    await turns()
    await model.end_batch()
    assert [1 in batch for batch in model.begun] == [False, False, True]
    for _ in range(20):
        await model.end_batch()
    assert await small == [2, 4]
    assert await large == [2 * number for number in range(100, 200)]


async def test_large_calls_go_on_although_small_ones_never_end() -> None:
    model = Model(batch_size=8)
    large, smalls = model.call(*range(100, 140)), [model.call(1)]
    for _ in range(40):
        smalls += [model.call(number) for number in range(8)]
        await model.end_batch()
    assert await asyncio.wait_for(large, 1) == [2 * number for number in range(100, 140)]
    for small in smalls:
        small.cancel()


async def test_large_calls_take_turns() -> None:
    model = Model(batch_size=2)
    calls = [model.call(*range(start, start + 20)) for start in (100, 200)]
    for _ in range(20):
        await model.end_batch()
    await asyncio.gather(*calls)
    assert [batch[0] // 100 for batch in model.begun[3:9]] in ([1, 2] * 3, [2, 1] * 3)


async def test_what_is_left_of_a_call_that_is_given_up_is_not_computed() -> None:
    model = Model(batch_size=2)
    given_up, other = model.call(*range(10)), model.call(20)
    await turns()
    begun = len(model.begun)
    given_up.cancel()
    for _ in range(begun + 1):
        await model.end_batch()
    assert await other == [40]
    assert len(model.begun) <= begun + 1
    assert model.batches.waiting == 0


async def test_an_error_is_that_of_the_calls_in_the_batch() -> None:
    model = Model(batch_size=2)
    unlucky, with_it, other = model.call(-1), model.call(1), model.call(2)
    for _ in range(3):
        await model.end_batch()
    assert [type(call.exception()) for call in (unlucky, with_it)] in (
        [ValueError, ValueError],
        [ValueError, type(None)],
    )
    assert await other == [4]


async def test_closing_cancels_all_calls() -> None:
    model = Model(batch_size=2)
    calls = [model.call(number) for number in range(7)]
    await turns()
    model.batches.close()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in ended)
    assert model.batches.waiting == 0


@pytest.mark.parametrize("seed", range(20))
async def test_random_calls_all_get_what_is_theirs(seed: int) -> None:
    rng = random.Random(seed)
    model = Model(batch_size=rng.randint(1, 9), at_once=rng.randint(1, 3))
    asked: list[list[int]] = []
    calls: list[asyncio.Task[list[int]]] = []
    for _ in range(60):
        asked.append([rng.randint(100, 999) for _ in range(rng.choice([1, 1, 2, 5, 30]))])
        calls.append(model.call(*asked[-1]))
        if rng.random() < 0.15:
            rng.choice(calls).cancel()
        if rng.random() < 0.5:
            await model.end_batch()
    for _ in range(1000):
        await model.end_batch()
    for numbers, call in zip(asked, calls, strict=True):
        assert call.cancelled() or call.result() == [2 * number for number in numbers]
    assert max(map(len, model.begun)) <= model.batches._batch_size
    assert model.batches.waiting == 0
