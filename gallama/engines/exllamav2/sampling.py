"""How one sequence chooses its next token from a row of logits: grammar first, temperature last.

The order and the meaning of the settings are those of the other engines; the library's own sampler has
another top_p, and cannot tell a model that computes no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gallama.engines.logits import NEUTRAL, allowed_tokens
from gallama.errors import EngineFailed
from gallama.generation import SamplingSettings

_SEED_BITS = 63
# So low that only the likeliest token is left.
_LEAST_TEMPERATURE = 1e-20
# A mask that allows tokens in more than this part of its words allows nearly all: no list of them is made.
_WIDE = 4
# Numbers that are summed up one by one; the sums of such blocks are what is searched first.
_BLOCK = 512
# How far below the best score to look for what top_k and top_p keep: mostly it is found among few.
_DEPTHS = (4.0, 8.0, 16.0)


class Sampler:
    """The settings and random numbers of one sequence. Used by one thread at a time."""

    def __init__(
        self,
        settings: SamplingSettings,
        *,
        prompt_length: int,
        vocabulary_size: int,
        unused_token_ids: Sequence[int],
    ) -> None:
        """
        Args:
            unused_token_ids: ids below `vocabulary_size` that no token has.
        """
        settings = settings.with_defaults(NEUTRAL)
        self._settings = settings
        self._vocabulary_size = vocabulary_size
        self._unused = np.array(unused_token_ids, dtype=np.intp)
        self._penalties = _Penalties(settings, prompt_length=prompt_length, vocabulary_size=vocabulary_size)
        seed = settings.seed
        self._random = np.random.default_rng(None if seed is None else seed % (1 << _SEED_BITS))

    def sample(
        self, logits: NDArray[np.float32], mask: NDArray[np.int32] | None, token_ids: Sequence[int]
    ) -> int:
        """Choose the next token.

        Args:
            logits: shape (vocabulary size,); left as it is.
            mask: the tokens that the grammar allows, as bits, or None where it allows all.
            token_ids: prompt and answer so far: those of the call before, and what has been added.

        Raises:
            EngineFailed: the model has computed no numbers.
        """
        if mask is not None and np.count_nonzero(mask) <= len(mask) // _WIDE:
            allowed = allowed_tokens(mask, self._vocabulary_size)
            assert len(allowed), "a grammar that goes on allows a token"
            if len(allowed) == 1:
                return int(allowed[0])
            return int(allowed[self._choose(self._penalties.apply(logits[allowed], allowed, token_ids))])
        return self._choose(self._penalties.apply(self._without(logits, mask), None, token_ids))

    def _without(self, logits: NDArray[np.float32], mask: NDArray[np.int32] | None) -> NDArray[np.float32]:
        """The logits, of which those that may not be chosen are impossible."""
        if mask is not None:
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=self._vocabulary_size)
            return np.where(bits.view(np.bool_), logits, np.float32(-np.inf))
        if not len(self._unused):
            return logits
        used = logits.copy()
        used[self._unused] = -np.inf
        return used

    def _choose(self, scores: NDArray[np.float32]) -> int:
        """The place of the score that is chosen."""
        best = int(scores.argmax())  # of NaN, if there is one
        if not np.isfinite(scores[best]):
            raise EngineFailed("The model computes no numbers; the answer cannot go on.")
        temperature = self._settings.temperature
        if not temperature:
            return best
        # Changes no probability, and what is divided by the temperature stays finite or becomes impossible.
        weights = scores - scores[best]
        places = self._kept_places(weights)
        if places is not None:
            weights = weights[places]
        with np.errstate(over="ignore"):
            weights /= np.float32(max(temperature, _LEAST_TEMPERATURE))
        # More than zero: what has no probability is never hit.
        place = _place_at(1.0 - self._random.random(), np.exp(weights, out=weights))
        return place if places is None else int(places[place])

    def _kept_places(self, scores: NDArray[np.float32]) -> NDArray[np.intp] | None:
        """Where the scores are that top_k, top_p and min_p leave, in this order; None: all are left.

        Args:
            scores: the best is 0.
        """
        settings = self._settings
        places: NDArray[np.intp] | None = None
        if settings.top_k and settings.top_k < len(scores):
            places = _best(scores, settings.top_k)
        if settings.top_p is not None and settings.top_p < 1.0:
            places = _within(places, _nucleus(scores if places is None else scores[places], settings.top_p))
        if settings.min_p:
            least = math.log(settings.min_p)
            places = _within(places, np.flatnonzero((scores if places is None else scores[places]) >= least))
        return places


class _Penalties:
    """What changes logits. Repetition counts in prompt and answer, the others in the answer."""

    def __init__(self, settings: SamplingSettings, *, prompt_length: int, vocabulary_size: int) -> None:
        self._prompt_length = prompt_length
        self._repetition = np.float32(settings.repetition_penalty or 1.0)
        self._frequency = np.float32(settings.frequency_penalty or 0.0)
        self._presence = np.float32(settings.presence_penalty or 0.0)
        self._biases = _dense(settings.logit_bias, vocabulary_size) if settings.logit_bias else None
        self._counts_tokens = bool(self._repetition != 1 or self._frequency or self._presence)
        self._counted = 0
        size = vocabulary_size if self._counts_tokens else 0
        self._is_in_text = np.zeros(size, dtype=bool)
        self._answer_counts = np.zeros(size, dtype=np.float32)

    def apply(
        self, logits: NDArray[np.float32], ids: NDArray[np.intp] | None, token_ids: Sequence[int]
    ) -> NDArray[np.float32]:
        """
        Args:
            logits: left as they are.
            ids: the tokens that they are of; None: all.
            token_ids: prompt and answer so far.
        """
        if self._biases is not None:
            logits = logits + (self._biases if ids is None else self._biases[ids])
        if not self._counts_tokens:
            return logits
        self._count(token_ids)
        places = np.flatnonzero(self._is_in_text if ids is None else self._is_in_text[ids])
        counts = self._answer_counts[places if ids is None else ids[places]]
        found = logits[places]
        if self._repetition != 1:
            found = np.where(found < 0, found * self._repetition, found / self._repetition)
        changed = logits.copy()
        changed[places] = found - self._frequency * counts - self._presence * (counts > 0)
        return changed

    def _count(self, token_ids: Sequence[int]) -> None:
        added = np.array(token_ids[self._counted :], dtype=np.intp)
        self._is_in_text[added] = True
        np.add.at(self._answer_counts, added[max(0, self._prompt_length - self._counted) :], 1)
        self._counted = len(token_ids)


def _within(places: NDArray[np.intp] | None, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
    """Of some places, or of all, those that were chosen among them."""
    return chosen if places is None else places[chosen]


def _dense(biases: Mapping[int, float], size: int) -> NDArray[np.float32]:
    dense = np.zeros(size, dtype=np.float32)
    dense[list(biases)] = list(biases.values())
    return dense


def _best(scores: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Where the `count` highest are; more, where some equal the last of them."""
    places = _upper(scores, lambda found: len(found) >= count)
    found = scores[places]
    best: NDArray[np.intp] = places[found >= np.partition(found, -count)[-count]]
    return best


def _nucleus(scores: NDArray[np.float32], top_p: float) -> NDArray[np.intp]:
    """Where the fewest likeliest are that have the probability `top_p` together; of equals, the first."""
    wanted = top_p * _mass(scores)
    places = _upper(scores, lambda found: _mass(scores[found]) >= wanted)
    found = scores[places]
    ordered = np.sort(found)[::-1]
    # The one that crosses the limit is kept, and the likeliest always is.
    count = int(np.searchsorted(np.exp(ordered).cumsum(dtype=np.float64), wanted)) + 1
    last = ordered[min(count, len(ordered)) - 1]
    above = places[found > last]
    return np.concatenate([above, places[found == last][: count - len(above)]])


def _place_at(share: float, weights: NDArray[np.float32]) -> int:
    """Where the sum of the weights up to there first reaches a share of the whole; never where one is 0.

    Args:
        share: more than 0, and 1 at most.
    """
    whole = len(weights) // _BLOCK * _BLOCK
    blocks = weights[:whole].reshape(-1, _BLOCK).sum(axis=1)
    sums = np.append(blocks, weights[whole:].sum()).cumsum(dtype=np.float64)
    hit = share * sums[-1]
    block = int(np.searchsorted(sums, hit))
    before = sums[block - 1] if block else 0.0
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    share_inside = (hit - before) / (sums[block] - before)
    return block * _BLOCK + int(np.searchsorted(inside, share_inside * inside[-1]))


def _mass(scores: NDArray[np.float32]) -> float:
    """What is proportional to their probability."""
    return float(np.exp(scores).sum(dtype=np.float64))


def _upper(scores: NDArray[np.float32], is_enough: Callable[[NDArray[np.intp]], bool]) -> NDArray[np.intp]:
    """Where the highest scores are: few, if those are enough, else all."""
    for depth in _DEPTHS:
        places = np.flatnonzero(scores >= -depth)
        if is_enough(places):
            return places
    return np.arange(len(scores))
