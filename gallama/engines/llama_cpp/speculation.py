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
from typing import NamedTuple, Protocol

from gallama.engines.step_cost import StepCost
from gallama.errors import GallamaError
from gallama.generation import State

logger = logging.getLogger(__name__)

# How many last tokens are looked up in the text, the longest run first, and how many tokens a match of them
# is trusted to foretell: two tokens alike mean little, sixteen are a copy under way.
_TRUSTED_TOKENS = {16: 64, 8: 32, 4: 12, 2: 6}
_KNOWN_LENGTHS = [max((run for run in _TRUSTED_TOKENS if run <= alike), default=0) for alike in range(17)]
# So many tokens alike are a copy. Where it departs from its source, it mostly comes back to it: for as many
# tokens as it may depart, two tokens alike not far from there say as much as six do elsewhere.
_COPIED_TOKENS, _DEPARTED_TOKENS = 8, 16
_ALIKE_NEARBY, _AS_ALIKE_AS = 2, 6
# How far from where it would be the copy is looked for: some words may have been left out, or repeated.
_TOKENS_AHEAD, _TOKENS_BACK = 16, 4
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
    prompt_length: int = 0
    """How many of the tokens are the prompt."""


class Kind(NamedTuple):
    """What speaks for a draft."""

    alike: int
    """How many of the text's last tokens stood before what is guessed, too, up to 16; 0: a model guesses."""
    is_from_prompt: bool = False
    """Whether that is in the prompt. What an answer repeats of itself it also leaves again sooner."""


MODEL_DRAFT = Kind(0)


@dataclass(frozen=True, slots=True)
class Draft:
    """A guess at the next tokens; without any there is none."""

    token_ids: list[int]
    kind: Kind = MODEL_DRAFT


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
        token_ids, alike, place = index.continuation(wish.most_tokens)
        token_ids = self._until_end(token_ids)
        if wish.state is not None and token_ids:
            token_ids = cut_to_grammar(wish.state, token_ids, wish.most_tokens)
        return Draft(token_ids, Kind(alike, is_from_prompt=place < wish.prompt_length))

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
        self._source = self._copied_until = 0
        """The place behind what was copied last, 0 if nothing was; and where the text ended then."""

    def catch_up(self) -> None:
        """Take in what the text has grown by: each place that follows some tokens and has one itself."""
        end = min(len(self._token_ids), self._next_place + _INDEXED_PER_STEP)
        for place in range(self._next_place, end):
            for length, table in self._tables.items():
                if place >= length:
                    table[_slot(self._token_ids[place - length : place])] = place
        self._next_place = max(end, self._next_place)

    def continuation(self, most_tokens: int) -> tuple[list[int], int, int]:
        """What followed the text's last tokens before, how many of those stood there too, and where that is.

        Over and over where it is still going on; nothing, 0 and 0 where there is no such place.
        """
        place, alike = self._same_tokens()
        trusted = _TRUSTED_TOKENS[_known_length(alike)] if place else 0
        if alike < _COPIED_TOKENS and (nearby := self._back_at_source()):
            place, alike = nearby, max(alike, _AS_ALIKE_AS)
            trusted = _TRUSTED_TOKENS[_COPIED_TOKENS]
        if not place:
            return [], 0, 0
        if alike >= _COPIED_TOKENS:
            self._source, self._copied_until = place, len(self._token_ids)
        count = min(most_tokens, trusted)
        followed = self._token_ids[place : place + count]
        return (followed * -(-count // len(followed)))[:count], alike, place

    def _same_tokens(self) -> tuple[int, int]:
        """Behind which place the text's last tokens stood before, and how many of them; 0: nowhere."""
        for length, table in self._tables.items():
            last_tokens = self._token_ids[-length:]
            place = table[_slot(last_tokens)]
            if place and self._token_ids[place - length : place] == last_tokens:
                return place, self._alike(place)
        return 0, 0

    def _back_at_source(self) -> int:
        """Where a copy that has departed from its source goes on in it; 0: nowhere, or there was none."""
        departed = len(self._token_ids) - self._copied_until
        if not self._source or departed > _DEPARTED_TOKENS:
            return 0
        expected = self._source + departed
        first, last = max(1, self._source - _TOKENS_BACK), self._source + _TOKENS_AHEAD
        places = range(first, min(last, len(self._token_ids) - 1) + 1)
        alike, _, place = max((self._alike(place), -abs(place - expected), place) for place in places)
        return place if alike >= _ALIKE_NEARBY else 0

    def _alike(self, place: int) -> int:
        """How many of the text's last tokens stand before a place, too; counted up to the longest run."""
        text, end, alike = self._token_ids, len(self._token_ids), 0
        most = min(place, max(_TRUSTED_TOKENS))
        while alike < most and text[place - 1 - alike] == text[end - 1 - alike]:
            alike += 1
        return alike


def _known_length(alike: int) -> int:
    """The longest of the runs that are looked up which so many equal tokens hold, two or more."""
    return _KNOWN_LENGTHS[min(alike, len(_KNOWN_LENGTHS) - 1)]


def _slot(token_ids: list[int]) -> int:
    return hash(tuple(token_ids)) & (_PLACES - 1)


# How often a guess is right before anything is known about a text, by what speaks for it.
_FIRST_TRUST = {
    MODEL_DRAFT: 0.75,
    **{Kind(alike, True): trust for alike, trust in {2: 0.5, 4: 0.8, 8: 0.95, 16: 0.97}.items()},
    **{Kind(alike, False): trust for alike, trust in {2: 0.4, 4: 0.6, 8: 0.8, 16: 0.9}.items()},
}
# As how many guesses that counts.
_FIRST_WEIGHT = 6.0
# What a guess says of the text after the next one, and after one that was not worth computing.
_DECAY, _DECAY_UNUSED = 0.97, 0.98
# In tokens of a step: what is gained by less is lost again in noise.
_LEAST_GAIN = 0.1


class Trust:
    """How far guesses are trusted in one answer: as far as they have been right, and pay for themselves.

    A draft's token can be right only if all before it are, and in a copy each of those makes it surer: where
    four tokens were alike and four guesses right, eight are alike. Each that is right saves a share of a
    step, and all of them make this step longer. Where not even the best length pays, nothing is computed,
    but the guess is held against the text all the same, so that a place which is easy to guess is found.
    """

    def __init__(self) -> None:
        self._counts: dict[Kind, tuple[float, float]] = {}
        """By kind: guessed tokens that were right, and those that were wrong."""
        self._watched: tuple[int, int, Kind] | None = None
        """A place in the text, what was guessed to stand there, and the guess's kind."""

    def watch(self, token_ids: Sequence[int], draft: Draft) -> None:
        """Learn from the guess before this one, unless it was computed: the text has gone on since.

        Args:
            token_ids: the text so far; the draft is what may follow.
        """
        if self._watched is not None and self._watched[0] < len(token_ids):
            place, guessed, kind = self._watched
            self._count(kind, is_right=token_ids[place] == guessed)
        self._watched = (len(token_ids), draft.token_ids[0], draft.kind) if draft.token_ids else None

    def best_length(
        self, most_tokens: int, kind: Kind, step_tokens: int, cost: StepCost, seconds_per_token: float = 0.0
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
        best, best_gain, right, chance = 0, _LEAST_GAIN * saving, 0.0, 1.0
        for length in range(1, most_tokens + 1):
            chance *= self.probability(_kind_after(kind, length - 1))
            right += chance
            longer_by = cost.seconds(step_tokens + length) - alone + length * seconds_per_token
            if right * saving - longer_by > best_gain:
                best, best_gain = length, right * saving - longer_by
        if best:
            self._watched = None
        else:
            self._decay(kind, _DECAY_UNUSED)
        return best

    def record(self, kind: Kind, drafted: int, accepted: int) -> None:
        """What became of a draft."""
        assert 0 <= accepted <= drafted
        for place in range(accepted):
            self._count(_kind_after(kind, place), is_right=True)
        if accepted < drafted:
            self._count(_kind_after(kind, accepted), is_right=False)

    def probability(self, kind: Kind) -> float:
        """That a guess is right where those before it are."""
        right, wrong = self._counts.get(_record_of(kind), (0.0, 0.0))
        first_trust = _FIRST_TRUST[_record_of(kind)]
        return (right + _FIRST_WEIGHT * first_trust) / (right + wrong + _FIRST_WEIGHT)

    def _count(self, kind: Kind, *, is_right: bool) -> None:
        self._decay(kind, _DECAY)
        right, wrong = self._counts[_record_of(kind)]
        self._counts[_record_of(kind)] = right + is_right, wrong + (not is_right)

    def _decay(self, kind: Kind, factor: float) -> None:
        right, wrong = self._counts.get(_record_of(kind), (0.0, 0.0))
        self._counts[_record_of(kind)] = right * factor, wrong * factor


def _kind_after(kind: Kind, right: int) -> Kind:
    """What speaks for a draft's next token when so many of it were right."""
    return Kind(kind.alike + right, kind.is_from_prompt) if kind.alike else kind


def _record_of(kind: Kind) -> Kind:
    """The kind that it is counted with."""
    return Kind(_known_length(kind.alike), kind.is_from_prompt) if kind.alike else kind
