"""Guessing tokens ahead, so that one batch checks several of them.

    text ... "the quick brown"         what has been read and written so far
    draft    "fox jumps over"          a guess at what comes next; computed behind the text in one batch
    answer   "fox jumps high"          what is sampled from the logits at each place

What was guessed right is kept and the rest is undone, so a guess never changes an answer, only its speed.
Everything here runs on the scheduler's thread.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from gallama.engines.llama_cpp.step_cost import StepCost
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


# The kind of a draft that a model made.
MODEL_DRAFT = 0


@dataclass(frozen=True, slots=True)
class Draft:
    """A guess at the next tokens; without any there is none."""

    token_ids: list[int]
    kind: int = MODEL_DRAFT
    """What speaks for it: a model, or that so many of the text's last tokens stood before what is guessed."""


NO_DRAFT = Draft([])


class Drafter(Protocol):
    """What guesses. Not one of its calls may fail: without a guess an answer goes on all the same."""

    @property
    def seconds_per_token(self) -> float:
        """What guessing a token takes, other than checking it; 0 where that is next to nothing."""
        ...

    def draft(self, wishes: Sequence[Wish]) -> list[Draft]:
        """A draft for each wish: at most `most_tokens`, none of them refused by the grammar."""
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

    seconds_per_token = 0.0

    def __init__(self, end_token_ids: Collection[int]) -> None:
        self._end_token_ids = frozenset(end_token_ids)
        self._indexes: dict[Hashable, _NgramIndex] = {}

    def draft(self, wishes: Sequence[Wish]) -> list[Draft]:
        return [self._draft(wish) for wish in wishes]

    def forget(self, key: Hashable) -> None:
        self._indexes.pop(key, None)

    def set_threads(self, threads: int) -> None:
        pass

    def close(self) -> None:
        self._indexes.clear()

    def _draft(self, wish: Wish) -> Draft:
        index = self._indexes.get(wish.key)
        if index is None:
            index = self._indexes[wish.key] = _NgramIndex(wish.token_ids)
        index.catch_up()
        token_ids, kind = index.continuation(wish.most_tokens)
        token_ids = self._until_end(token_ids)
        if wish.state is not None and token_ids:
            token_ids = cut_to_grammar(wish.state, token_ids, wish.most_tokens)
        return Draft(token_ids, kind)

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

    def continuation(self, most_tokens: int) -> tuple[list[int], int]:
        """What followed the text's last tokens before, and how many of those stood there too.

        Over and over where that is still going on.
        """
        for length, table in self._tables.items():
            last_tokens = self._token_ids[-length:]
            place = table[_slot(last_tokens)]  # 0: none
            if place and self._token_ids[place - length : place] == last_tokens:
                count = min(most_tokens, _TRUSTED_TOKENS[length])
                followed = self._token_ids[place : place + count]
                return (followed * -(-count // len(followed)))[:count], length
        return [], MODEL_DRAFT


def _slot(token_ids: list[int]) -> int:
    return hash(tuple(token_ids)) & (_PLACES - 1)


# How often a guess is right before anything is known about a text, by what speaks for it.
_FIRST_TRUST = {MODEL_DRAFT: 0.75, 2: 0.4, 4: 0.6, 8: 0.85, 16: 0.95}
# As how many guesses that counts.
_FIRST_WEIGHT = 6.0
# What a draft says of the text after the next one, and after one that was not worth computing.
_DECAY, _DECAY_UNUSED = 0.9, 0.98
# In tokens of a step: what is gained by less is lost again in noise.
_LEAST_GAIN = 0.1


class Trust:
    """How far guesses are trusted in one answer: as far as they have been right, and pay for themselves.

    Of a draft's tokens the k-th is right if all before it are, too: with a probability of p ** k, where p is
    how often guesses of its kind have been right of late. Each saves a share of a step, and all of them make
    this step longer. Where not even the best length pays, nothing is drafted; with time the text's record
    counts less, so that a place which is easy to guess is tried again.
    """

    def __init__(self) -> None:
        self._counts: dict[int, tuple[float, float]] = {}
        """By kind: guesses that were right, and drafts that ended in a wrong one."""

    def best_length(
        self, most_tokens: int, kind: int, step_tokens: int, cost: StepCost, seconds_per_token: float = 0.0
    ) -> int:
        """How many of a draft's tokens to compute, at most; 0: none.

        Args:
            step_tokens: of the step without this draft.
            seconds_per_token: what guessing itself takes.
        """
        if not cost.is_known:
            return 0
        alone = cost.seconds(step_tokens)
        saving = alone / step_tokens
        probability = self.probability(kind)
        best, best_gain, right, chance = 0, _LEAST_GAIN * saving, 0.0, 1.0
        for length in range(1, most_tokens + 1):
            chance *= probability
            right += chance
            longer_by = cost.seconds(step_tokens + length) - alone + length * seconds_per_token
            if right * saving - longer_by > best_gain:
                best, best_gain = length, right * saving - longer_by
        if not best:
            self._decay(kind, _DECAY_UNUSED)
        return best

    def record(self, kind: int, drafted: int, accepted: int) -> None:
        """What became of a draft."""
        assert 0 <= accepted <= drafted
        if drafted:
            self._decay(kind, _DECAY)
            right, wrong = self._counts.get(kind, (0.0, 0.0))
            self._counts[kind] = right + accepted, wrong + (accepted < drafted)

    def probability(self, kind: int) -> float:
        """That a guess is right where those before it are."""
        right, wrong = self._counts.get(kind, (0.0, 0.0))
        return (right + _FIRST_WEIGHT * _FIRST_TRUST[kind]) / (right + wrong + _FIRST_WEIGHT)

    def _decay(self, kind: int, factor: float) -> None:
        right, wrong = self._counts.get(kind, (0.0, 0.0))
        self._counts[kind] = right * factor, wrong * factor
