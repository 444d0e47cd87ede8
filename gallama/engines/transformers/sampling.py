"""How one sequence chooses its next token: grammar first, then transformers' own processors.

They stand in the order of llama.cpp's sampler chain, temperature last, so that the same settings mean the
same with every engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gallama.engines.logits import NEUTRAL, allowed_tokens
from gallama.errors import GallamaError
from gallama.generation import SamplingSettings

_SEED_BITS = 63
# So low that only the likeliest token is left, and not so low that float32 overflows.
_LEAST_TEMPERATURE = 1e-30


class Sampler:
    """The processors and random numbers of one sequence. Used by one thread."""

    def __init__(
        self,
        settings: SamplingSettings,
        *,
        prompt_token_ids: Sequence[int],
        unused_token_ids: Sequence[int],
        vocabulary_size: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            unused_token_ids: ids below `vocabulary_size` that no token has.
        """
        settings = settings.with_defaults(NEUTRAL)
        self._device = device
        self._vocabulary_size = vocabulary_size
        self._unused = torch.tensor(unused_token_ids, dtype=torch.long, device=device)
        self._token_ids = list(prompt_token_ids)
        self._answer_counts = torch.zeros(vocabulary_size, dtype=torch.float32, device=device)
        self._penalties = _penalties(settings, self._answer_counts)
        self._warpers = _warpers(settings)
        self._is_greedy = not settings.temperature
        self._generator = torch.Generator(device)
        self._generator.manual_seed(_seed(settings.seed))

    def sample(self, logits: torch.Tensor, mask: NDArray[np.int32] | None) -> int:
        """Choose the next token.

        Args:
            logits: shape (vocabulary size,), float32; left as it is.
            mask: the tokens that the grammar allows, as bits, or None where it allows all.

        Raises:
            GallamaError: the model has computed no numbers.
        """
        if mask is None:
            allowed = logits.index_fill(0, self._unused, -torch.inf)
        else:
            token_ids = allowed_tokens(mask, self._vocabulary_size)
            assert len(token_ids), "a grammar that goes on allows a token"
            if len(token_ids) == 1:
                return int(token_ids[0])
            places = torch.from_numpy(token_ids).to(self._device)
            allowed = torch.full_like(logits, -torch.inf).index_copy(0, places, logits[places])
        return self._choose(allowed)

    def accept(self, token_ids: Sequence[int]) -> None:
        """Count tokens that were taken, sampled or forced."""
        self._token_ids += token_ids
        if self._penalties:
            places = torch.tensor(token_ids, dtype=torch.long, device=self._device)
            self._answer_counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float32))

    def _choose(self, allowed: torch.Tensor) -> int:
        scores = allowed[None]
        if self._penalties:
            taken = torch.tensor([self._token_ids], dtype=torch.long, device=self._device)
            for penalty in self._penalties:
                scores = penalty(taken, scores)
        best, token = scores[0].max(dim=0)
        if not torch.isfinite(best):
            raise GallamaError("The model computes no numbers; the answer cannot go on.")
        if self._is_greedy:
            return int(token)
        scores = scores - best  # changes no probability, and what is divided by the temperature stays finite
        for warper in self._warpers:
            scores = warper(torch.empty(0, dtype=torch.long), scores)
        probabilities = torch.softmax(scores[0], dim=0)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


class AnswerPenalty(LogitsProcessor):  # type: ignore[misc]
    """Frequency and presence penalties as OpenAI has them: subtracted, and for tokens of the answer only."""

    def __init__(self, counts: torch.Tensor, *, frequency: float, presence: float) -> None:
        """
        Args:
            counts: how often each token stands in the answer; changes as it grows.
        """
        self._counts = counts
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - self._frequency * self._counts - self._presence * (self._counts > 0)


class LogitBias(LogitsProcessor):  # type: ignore[misc]
    """Adds to the logits of some tokens."""

    def __init__(self, biases: dict[int, float], like: torch.Tensor) -> None:
        """
        Args:
            like: a row of logits.
        """
        self._biases = torch.zeros_like(like)
        places = torch.tensor(list(biases), dtype=torch.long, device=like.device)
        self._biases[places] = torch.tensor(list(biases.values()), dtype=like.dtype, device=like.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self._biases


def _penalties(settings: SamplingSettings, answer_counts: torch.Tensor) -> list[LogitsProcessor]:
    """What changes logits. Repetition counts in prompt and answer, the others in the answer."""
    penalties: list[LogitsProcessor] = []
    if settings.logit_bias:
        penalties.append(LogitBias(dict(settings.logit_bias), answer_counts))
    if settings.repetition_penalty != 1.0:
        penalties.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty or 1.0)))
    if settings.frequency_penalty or settings.presence_penalty:
        penalties.append(
            AnswerPenalty(
                answer_counts,
                frequency=settings.frequency_penalty or 0.0,
                presence=settings.presence_penalty or 0.0,
            )
        )
    return penalties


def _warpers(settings: SamplingSettings) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        warpers.append(MinPLogitsWarper(settings.min_p))
    if settings.temperature and settings.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(max(float(settings.temperature), _LEAST_TEMPERATURE)))
    return warpers


def _seed(seed: int | None) -> int:
    return secrets.randbits(_SEED_BITS) if seed is None else seed % (1 << _SEED_BITS)
