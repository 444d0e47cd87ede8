"""Batches of what many calls ask for at the same time, each as full as it can be.

A batch of one text takes nearly as long as one of ten. So a batch is formed as late as possible: while one is
computed, what comes meanwhile waits, and makes the next one fuller. Only a full one is handed over early.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# What calls with more items than a batch has get of each batch, while smaller ones wait, too.
_SHARE_OF_LARGE_CALLS = 4


@dataclass(slots=True, eq=False)
class _Call(Generic[Item, Result]):
    items: Sequence[Item]
    left: deque[int]
    """The indexes of the items that are in no batch yet."""
    results: dict[int, Result]
    done: asyncio.Future[None]


class FullBatches(Generic[Item, Result]):
    """Has batches computed. Belongs to one event loop, where all its changes are synchronous."""

    def __init__(
        self,
        compute: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        batch_size: int,
        at_once: int = 1,
    ) -> None:
        """
        Args:
            compute: gives a result for each item of a batch.
            at_once: batches that are computed at the same time; as many full ones may wait there.
        """
        self._compute = compute
        self._batch_size = batch_size
        self._at_once = at_once
        self._computing = 0
        self._waiting: deque[_Call[Item, Result]] = deque()
        """Calls that have items left, in their order."""
        self._open: set[_Call[Item, Result]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Items that are in no batch yet."""
        return sum(len(call.left) for call in self._waiting)

    async def compute(self, items: Sequence[Item]) -> list[Result]:
        """A result for each item, in their order. Cancelling drops those that are in no batch yet.

        Raises:
            What computing raised for a batch with one of them.
        """
        if not items:
            return []
        done = asyncio.get_running_loop().create_future()
        call = _Call[Item, Result](items, deque(range(len(items))), {}, done)
        self._waiting.append(call)
        self._open.add(call)
        try:
            self._hand_over()
            await done
        finally:
            self._open.discard(call)
            if call in self._waiting:
                self._waiting.remove(call)
        return [call.results[index] for index in range(len(items))]

    def close(self) -> None:
        """Cancel every call, and what is computed for it."""
        self._waiting.clear()
        for call in self._open:
            call.done.cancel()
        for task in self._tasks:
            task.cancel()

    def _hand_over(self) -> None:
        while self._waiting and self._may_hand_over():
            self._computing += 1
            task = asyncio.create_task(self._compute_batch(self._take()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _may_hand_over(self) -> bool:
        if self._computing < self._at_once:
            return True
        return self._computing < 2 * self._at_once and self.waiting >= self._batch_size

    def _take(self) -> list[tuple[_Call[Item, Result], int]]:
        """The next batch: first of calls that fit into one, then of the large ones in turn, which get a share
        in any case."""
        large = [call for call in self._waiting if len(call.left) > self._batch_size]
        small = [call for call in self._waiting if len(call.left) <= self._batch_size]
        for_small = self._batch_size - (self._batch_size // _SHARE_OF_LARGE_CALLS if large else 0)
        batch: list[tuple[_Call[Item, Result], int]] = []
        for calls, size in ((small, for_small), (large, self._batch_size)):
            for call in calls:
                while call.left and len(batch) < size:
                    batch.append((call, call.left.popleft()))
        # The large call whose turn it was goes behind the others.
        turned = [*small, *large[1:], *large[:1]]
        self._waiting = deque(call for call in turned if call.left)
        return batch

    async def _compute_batch(self, batch: Sequence[tuple[_Call[Item, Result], int]]) -> None:
        try:
            results = await self._compute([call.items[index] for call, index in batch])
            for (call, index), result in zip(batch, results, strict=True):
                call.results[index] = result
        except Exception as error:
            for call in {call for call, _ in batch}:
                if not call.done.done():
                    call.done.set_exception(error)
        else:
            for call in {call for call, _ in batch}:
                if len(call.results) == len(call.items) and not call.done.done():
                    call.done.set_result(None)
        finally:
            self._computing -= 1
            self._hand_over()
