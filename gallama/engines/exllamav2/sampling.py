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
_LEAST_TEMPERATURE = 1e-30
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
        if mask is None:
            return self._choose(self._penalties.apply(self._without_unused(logits), slice(None), token_ids))
        allowed = allowed_tokens(mask, self._vocabulary_size)
        assert len(allowed), "a grammar that goes on allows a token"
        if len(allowed) == 1:
            return int(allowed[0])
        return int(allowed[self._choose(self._penalties.apply(logits[allowed], allowed, token_ids))])

    def _without_unused(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
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
        if not self._settings.temperature:
            return best
        # Changes no probability, and what is divided by the temperature stays finite.
        below_best = scores - scores[best]
        places = self._kept_places(below_best)
        kept = below_best[places].astype(np.float64)
        kept /= max(self._settings.temperature, _LEAST_TEMPERATURE)
        sums = np.exp(kept).cumsum()
        # More than zero: what has no probability is never hit.
        hit = sums[-1] * (1.0 - self._random.random())
        return int(places[np.searchsorted(sums, hit)])

    def _kept_places(self, scores: NDArray[np.float32]) -> NDArray[np.intp]:
        """Where the scores are that top_k, top_p and min_p leave, in this order.

        Args:
            scores: the best is 0.
        """
        settings = self._settings
        places = np.arange(len(scores))
        if settings.top_k and settings.top_k < len(scores):
            places = _best(scores, settings.top_k)
        if settings.top_p is not None and settings.top_p < 1.0:
            places = places[_nucleus(scores[places], settings.top_p)]
        if settings.min_p:
            places = places[scores[places] >= math.log(settings.min_p)]
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
        self, logits: NDArray[np.float32], ids: NDArray[np.intp] | slice, token_ids: Sequence[int]
    ) -> NDArray[np.float32]:
        """
        Args:
            logits: left as they are.
            ids: the tokens that they are of.
            token_ids: prompt and answer so far.
        """
        if self._biases is not None:
            logits = logits + self._biases[ids]
        if not self._counts_tokens:
            return logits
        self._count(token_ids)
        if self._repetition != 1:
            repeated = np.where(logits < 0, logits * self._repetition, logits / self._repetition)
            logits = np.where(self._is_in_text[ids], repeated, logits)
        counts = self._answer_counts[ids]
        return logits - self._frequency * counts - self._presence * (counts > 0)

    def _count(self, token_ids: Sequence[int]) -> None:
        added = np.array(token_ids[self._counted :], dtype=np.intp)
        self._is_in_text[added] = True
        np.add.at(self._answer_counts, added[max(0, self._prompt_length - self._counted) :], 1)
        self._counted = len(token_ids)


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
    """Where the fewest likeliest are that have the probability `top_p` together."""
    wanted = top_p * float(np.exp(scores, dtype=np.float64).sum())
    places = _upper(scores, lambda found: float(np.exp(scores[found], dtype=np.float64).sum()) >= wanted)
    order = places[np.argsort(-scores[places], kind="stable")]
    sums = np.exp(scores[order], dtype=np.float64).cumsum()
    # The one that crosses the limit is kept, and the likeliest always is.
    nucleus: NDArray[np.intp] = order[: np.searchsorted(sums, wanted) + 1]
    return nucleus


def _upper(scores: NDArray[np.float32], is_enough: Callable[[NDArray[np.intp]], bool]) -> NDArray[np.intp]:
    """Where the highest scores are: few, if those are enough, else all."""
    for depth in _DEPTHS:
        places = np.flatnonzero(scores >= -depth)
        if is_enough(places):
            return places
    return np.arange(len(scores))
