"""Guessing tokens ahead, so that one batch checks several of them.

    text ... "the quick brown"         what has been read and written so far
    draft    "fox jumps over"          a guess at what comes next; computed behind the text in one batch
    answer   "fox jumps high"          what is sampled from the logits at each place

What was guessed right is kept and the rest is undone, so a guess never changes an answer, only its speed.
Everything here runs on the scheduler's thread.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from gallama.errors import GallamaError
from gallama.generation import State

logger = logging.getLogger(__name__)

# How many last tokens are looked up in the text, the longest run first, and how many tokens a match of them
# is trusted to foretell: two tokens alike mean little, sixteen are a copy under way.
_TRUSTED_TOKENS = {16: 64, 8: 16, 4: 8, 2: 3}
# Places that are remembered for each length, 4 bytes each.
_PLACES = 2**16
# Tokens that one step takes into the index of one text, about 1.5 microseconds each.
_INDEXED_PER_STEP = 1024


@dataclass(slots=True)
class Wish:
    """A slot that would like a draft."""

    key: Hashable
    """The slot's identity, from its first wish until it is forgotten."""
    token_ids: list[int]
    """Prompt and answer so far: the same list in every wish of a slot, longer each time."""
    most_tokens: int
    state: State | None = None
    """The grammar at the end of `token_ids`, which a drafter clones and never changes."""


class Drafter(Protocol):
    """What guesses. Not one of its calls may fail: without a guess an answer goes on all the same."""

    def draft(self, wishes: Sequence[Wish]) -> list[list[int]]:
        """A draft for each wish: at most `most_tokens`, none refused by the grammar; [] without a guess."""
        ...

    def forget(self, key: Hashable) -> None:
        """The slot has ended; one that never wished is fine."""
        ...

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from here on."""
        ...

    def close(self) -> None: ...


def cut_to_grammar(state: State, token_ids: Sequence[int], most_tokens: int) -> list[int]:
    """A draft as the grammar lets it go on: cut where it would not, completed where it leaves no choice.

    What is forced takes the place of the guess, as it would without a draft: the same text cut into other
    tokens is refused when it is checked.
    """
    taken: list[int] = []
    with errors_end_the_draft():
        place = state.clone()
        while len(taken) < most_tokens and place.status in ("running", "may_end"):
            run = place.forced()
            if not run and taken == token_ids[: len(taken)]:
                run = list(token_ids[len(taken) : len(taken) + 1])
            if not run or place.advance(run) < len(run):
                break
            taken += run
    return taken[:most_tokens]


@contextmanager
def errors_end_the_draft() -> Iterator[None]:
    """Let a grammar break on a guess: whether it does so on the answer is to be seen."""
    try:
        yield
    except GallamaError:
        logger.debug("a grammar broke on a guess", exc_info=True)
    except BaseException:  # a Rust panic is one
        logger.exception("a grammar broke on a guess")


class NgramDrafter:
    """Looks the last tokens up in prompt and answer, and guesses what followed them there."""

    def __init__(self, end_token_ids: Collection[int]) -> None:
        self._end_token_ids = frozenset(end_token_ids)
        self._indexes: dict[Hashable, _NgramIndex] = {}

    def draft(self, wishes: Sequence[Wish]) -> list[list[int]]:
        return [self._draft(wish) for wish in wishes]

    def forget(self, key: Hashable) -> None:
        self._indexes.pop(key, None)

    def set_threads(self, threads: int) -> None:
        pass

    def close(self) -> None:
        self._indexes.clear()

    def _draft(self, wish: Wish) -> list[int]:
        index = self._indexes.get(wish.key)
        if index is None:
            index = self._indexes[wish.key] = _NgramIndex(wish.token_ids)
        index.catch_up()
        draft = self._until_end(index.continuation(wish.most_tokens))
        if wish.state is None or not draft:
            return draft
        return cut_to_grammar(wish.state, draft, wish.most_tokens)

    def _until_end(self, token_ids: list[int]) -> list[int]:
        """An end token is never a good guess: where it is right, nothing comes behind it."""
        ends = (place for place, token_id in enumerate(token_ids) if token_id in self._end_token_ids)
        return token_ids[: next(ends, len(token_ids))]


class _NgramIndex:
    """Where each run of a few tokens stood last in one text.

    Hash tables of a fixed size, in which the later of two places with one hash wins: memory is bounded
    whatever the text's length, and what is found is compared with the text before it is believed.
    """

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids
        self._tables = {length: array("i", bytes(4 * _PLACES)) for length in _TRUSTED_TOKENS}
        self._next_place = 1

    def catch_up(self) -> None:
        """Take in what the text has grown by: each place that follows some tokens and has one itself."""
        end = min(len(self._token_ids), self._next_place + _INDEXED_PER_STEP)
        for place in range(self._next_place, end):
            for length, table in self._tables.items():
                if place >= length:
                    table[_slot(self._token_ids[place - length : place])] = place
        self._next_place = max(end, self._next_place)

    def continuation(self, most_tokens: int) -> list[int]:
        """What followed the text's last tokens before; over and over where that is still going on."""
        for length, table in self._tables.items():
            last_tokens = self._token_ids[-length:]
            place = table[_slot(last_tokens)]  # 0: none
            if place and self._token_ids[place - length : place] == last_tokens:
                count = min(most_tokens, _TRUSTED_TOKENS[length])
                followed = self._token_ids[place : place + count]
                return (followed * -(-count // len(followed)))[:count]
        return []


def _slot(token_ids: list[int]) -> int:
    return hash(tuple(token_ids)) & (_PLACES - 1)


# What a text is like before anything is known about it: three guesses of four are right.
_FIRST_RIGHT, _FIRST_WRONG = 3.0, 1.0
# What a round of drafting is worth after the next one.
_DECAY = 0.9
_FIRST_LENGTH = 4
_PAUSE_STEPS = 64
_PROBE_LENGTH = 2


class DraftLength:
    """How many tokens to guess next for one answer: as many as pay for themselves.

    Of a draft's tokens the k-th is right if all before it are, too: with a probability of p ** k, where p
    is how often guesses have been right of late. It pays while that times what it saves is above its cost.
    Where not even the first one pays there is no drafting, but for a short probe now and then: a text may
    come to a place that is easy to guess.
    """

    def __init__(self, most_tokens: int) -> None:
        self._limit = most_tokens
        self._length = min(_FIRST_LENGTH, most_tokens)
        self._right, self._wrong = _FIRST_RIGHT, _FIRST_WRONG
        self._pause_steps = 0

    @property
    def is_off(self) -> bool:
        """Whether drafting loses on this answer, as far as is known."""
        return self._length == 0

    def most_tokens(self) -> int:
        """Tokens to guess in this step, to be asked once a step; 0: none."""
        if not self.is_off:
            return self._length
        self._pause_steps -= 1
        return min(_PROBE_LENGTH, self._limit) if self._pause_steps < 0 else 0

    def record(
        self, drafted: int, accepted: int, saving_per_accepted: float, cost_per_drafted: float
    ) -> None:
        """What became of a draft; one of no tokens says nothing.

        Args:
            saving_per_accepted: of an accepted token, in the unit of `cost_per_drafted`; 0: not known yet.
        """
        assert 0 <= accepted <= drafted
        if not drafted or not saving_per_accepted:
            return
        if self.is_off:
            if accepted < drafted:
                self._pause_steps = _PAUSE_STEPS
                return
            self._right, self._wrong = _FIRST_RIGHT, _FIRST_WRONG
        self._right = self._right * _DECAY + accepted
        self._wrong = self._wrong * _DECAY + (accepted < drafted)
        self._length = self._paying_length(saving_per_accepted, cost_per_drafted)
        self._pause_steps = _PAUSE_STEPS if self.is_off else 0

    def _paying_length(self, saving: float, cost: float) -> int:
        """The largest k with p ** k * saving > cost, as far as the limit."""
        p = self._right / (self._right + self._wrong)
        if cost >= p * saving:
            return 0
        if cost <= p**self._limit * saving:
            return self._limit
        return max(1, math.floor(math.log(cost / saving) / math.log(p)))
