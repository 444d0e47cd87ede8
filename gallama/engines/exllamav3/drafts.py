"""Which tokens are checked ahead in a step: runs that grammars force, and guesses.

A step is a rectangle: each text has as many places in it as the one with the longest draft. Nothing here
knows the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Few widths, since the library captures a graph for each. With the token before them, steps of 2, 4, 8, ...
_WIDTHS = (1, 3, 7, 15, 31, 63)


@dataclass(frozen=True, slots=True)
class Draft:
    """What may come next in one text."""

    token_ids: Sequence[int]
    are_forced: bool = False
    """By its grammar, so that all of them will be taken. Else they are a guess."""

    @property
    def guessed(self) -> int:
        return 0 if self.are_forced else len(self.token_ids)


NO_DRAFT = Draft(())


def lay_out(drafts: Sequence[Draft], *, width: int, most: int) -> list[list[int]]:
    """The rectangle, a row for each text, without the token that each is sure of; [] where it is empty.

    Wider than it is anyway it only gets where that may bring a token for each text, all told: the places
    of the other texts are computed for nothing.

    Args:
        width: of the guesses that a draft model has made.
        most: the widest it may be.
    """
    lengths = [len(draft.token_ids) for draft in drafts]
    width = _choose_width(lengths, width, most)
    return [_padded(draft.token_ids, width) for draft in drafts] if width else []


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the first on."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _choose_width(lengths: Sequence[int], least: int, most: int) -> int:
    """The smallest width that holds all, or as much as pays."""
    longest = min(max(lengths, default=0), most)
    holding = [width for width in _WIDTHS if longest <= width <= most] or [most]
    smaller = [width for width in _WIDTHS if width < holding[0]]
    for width in [holding[0], *reversed(smaller)]:
        gained = sum(min(length, width) - min(length, least) for length in lengths)
        if width > least and gained >= len(lengths):
            return width
    return least


def _padded(token_ids: Sequence[int], width: int) -> list[int]:
    """As wide as that, by repeating a token: wrong guesses are harmless."""
    row = list(token_ids[:width])
    return row + (row[-1:] or [0]) * (width - len(row))
