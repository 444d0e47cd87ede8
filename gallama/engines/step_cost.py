"""What a batch costs, learned from the steps so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

# How much a new step says of its size: a text grows, and other work on the machine comes and goes.
_NEWEST = 0.2
# One step that was held up by something else is not believed beyond this.
_MOST_SURPRISE = 2.0
# What was learned so many steps ago is forgotten, or one bad moment would make that size avoided for ever.
_REMEMBERED_STEPS = 500


@dataclass(slots=True)
class _Size:
    """Steps of about one size."""

    tokens: float
    seconds: float
    last_step: int


class StepCost:
    """How long steps take, by how many tokens they have.

    Kept by size, three sizes to the next power of two, as it is no straight line: on a CPU the second token
    costs nearly as much as the first, and the third and fourth hardly more than the second.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._steps = 0

    @property
    def is_known(self) -> bool:
        return bool(self._sizes)

    def record(self, tokens: int, seconds: float) -> None:
        """Learn from a step."""
        self._steps += 1
        key = round(3 * math.log2(tokens))
        size = self._sizes.get(key)
        if size is None or self._steps - size.last_step > _REMEMBERED_STEPS:
            self._sizes[key] = _Size(tokens, seconds, self._steps)
            return
        size.tokens += _NEWEST * (tokens - size.tokens)
        size.seconds += _NEWEST * (min(seconds, _MOST_SURPRISE * size.seconds) - size.seconds)
        size.last_step = self._steps

    def seconds(self, tokens: int) -> float:
        """How long a step of so many tokens takes: between the two sizes beside it, on a straight line.

        Beyond the largest in proportion to it, and below the smallest as long.
        """
        assert self._sizes, "nothing is known"
        below, above = self._neighbours(tokens)
        if below is None or above is None:
            nearest = below or above
            assert nearest is not None
            return nearest.seconds * max(1.0, tokens / nearest.tokens)
        share = (tokens - below.tokens) / (above.tokens - below.tokens)
        return below.seconds + share * (above.seconds - below.seconds)

    def tokens_within(self, seconds: float) -> int:
        """How many tokens a step of that length may have; 0 while nothing is known, or where none fits."""
        if not self._sizes:
            return 0
        most = 1 << 16
        while most and self.seconds(most) > seconds:
            most = most * 3 // 4
        return most

    def _neighbours(self, tokens: int) -> tuple[_Size | None, _Size | None]:
        below: _Size | None = None
        above: _Size | None = None
        for size in self._sizes.values():
            if self._steps - size.last_step > _REMEMBERED_STEPS:
                continue
            if size.tokens <= tokens and (below is None or size.tokens > below.tokens):
                below = size
            if size.tokens > tokens and (above is None or size.tokens < above.tokens):
                above = size
        return below, above
