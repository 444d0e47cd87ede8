"""What was computed of texts that have ended, for those that begin in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import DynamicCache


@dataclass(frozen=True, slots=True, eq=False)
class ComputedText:
    token_ids: list[int]
    cache: DynamicCache
    """Of all of them."""


class KeptTexts:
    """Texts with their caches, the least recently used first."""

    def __init__(self) -> None:
        self._texts: list[ComputedText] = []

    @property
    def tokens(self) -> int:
        return sum(len(text.token_ids) for text in self._texts)

    def most_alike(self, token_ids: Sequence[int]) -> ComputedText | None:
        """The text that has the longest beginning in common."""
        return max(self._texts, key=lambda text: common_prefix(text.token_ids, token_ids), default=None)

    def use(self, text: ComputedText) -> None:
        """Let it be the last to go, if it is one of these."""
        if text in self._texts:
            self._texts.remove(text)
            self._texts.append(text)

    def keep(self, text: ComputedText) -> None:
        """Add a text, unless another goes on with it; those that it goes on with are in it."""
        longer = self.most_alike(text.token_ids)
        if longer is not None and longer.token_ids[: len(text.token_ids)] == text.token_ids:
            self.use(longer)
            return
        self._texts = [
            other
            for other in self._texts
            if common_prefix(other.token_ids, text.token_ids) < len(other.token_ids)
        ]
        self._texts.append(text)

    def shrink(self, most_tokens: int) -> None:
        """Drop texts until no more than so many tokens are left."""
        while self._texts and self.tokens > most_tokens:
            del self._texts[0]

    def clear(self) -> None:
        self._texts.clear()


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(place for place in range(length) if one[place] != other[place])
