"""How one sequence chooses its next token: grammar first, then llama.cpp's sampler chain."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gallama.engines.llama_cpp import bindings
from gallama.engines.logits import NEUTRAL, allowed_tokens
from gallama.generation import SamplingSettings

# llama.cpp reads this seed as "take a random one".
_RANDOM_SEED = 0xFFFFFFFF


class Sampler:
    """The sampler chain of one sequence. Used by one thread."""

    def __init__(
        self,
        settings: SamplingSettings,
        *,
        vocabulary_size: int,
        context_length: int,
        prompt_token_ids: Sequence[int],
        candidates: bindings.Candidates,
    ) -> None:
        settings = settings.with_defaults(NEUTRAL)
        self._candidates = candidates
        self._vocabulary_size = vocabulary_size
        self._chain = bindings.SamplerChain()
        for sampler in _penalties(settings, vocabulary_size, context_length, prompt_token_ids):
            self._chain.add(sampler)
        for sampler in _choosers(settings):
            self._chain.add(sampler)
        self._is_plain_greedy = _is_plain_greedy(settings)

    def sample(self, logits: NDArray[np.float32], mask: NDArray[np.int32] | None) -> int:
        """Choose the next token.

        Args:
            logits: shape (vocabulary_size,); left as it is.
            mask: the tokens that the grammar allows, as bits, or None where it allows all.
        """
        if mask is None:
            if self._is_plain_greedy:
                return int(logits.argmax())
            self._candidates.set_all(logits)
            return self._chain.pick(self._candidates)
        allowed = allowed_tokens(mask, self._vocabulary_size)
        assert len(allowed), "a grammar that goes on allows a token"
        if len(allowed) == 1:
            return int(allowed[0])
        if self._is_plain_greedy:
            return int(allowed[logits[allowed].argmax()])
        self._candidates.set_some(allowed, logits)
        return self._chain.pick(self._candidates)

    def accept(self, token_ids: Sequence[int]) -> None:
        """Count tokens that were taken, sampled or forced."""
        for token_id in token_ids:
            self._chain.accept(token_id)

    def close(self) -> None:
        self._chain.close()


def _penalties(
    settings: SamplingSettings, vocabulary_size: int, context_length: int, prompt: Sequence[int]
) -> list[object]:
    """The samplers that change logits. Repetition counts in prompt and answer, the others in the answer."""
    samplers = []
    if settings.logit_bias:
        samplers.append(bindings.make_logit_bias(vocabulary_size, dict(settings.logit_bias)))
    if settings.repetition_penalty != 1.0:
        assert settings.repetition_penalty is not None
        sampler = bindings.make_penalties(
            vocabulary_size, last_tokens=context_length, repetition=settings.repetition_penalty
        )
        bindings.accept_into(sampler, prompt)
        samplers.append(sampler)
    if settings.frequency_penalty or settings.presence_penalty:
        samplers.append(
            bindings.make_penalties(
                vocabulary_size,
                last_tokens=context_length,
                frequency=settings.frequency_penalty or 0.0,
                presence=settings.presence_penalty or 0.0,
            )
        )
    return samplers


def _choosers(settings: SamplingSettings) -> list[object]:
    if not settings.temperature:
        return [bindings.make_greedy()]
    samplers = []
    if settings.top_k:
        samplers.append(bindings.make_top_k(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1.0:
        samplers.append(bindings.make_top_p(settings.top_p))
    if settings.min_p:
        samplers.append(bindings.make_min_p(settings.min_p))
    return [
        *samplers,
        bindings.make_temperature(settings.temperature),
        bindings.make_distribution(_seed(settings.seed)),
    ]


def _seed(seed: int | None) -> int:
    """A 32-bit seed of any integer; never the one that means "random" to llama.cpp."""
    if seed is None:
        seed = secrets.randbits(32)
    # Neighbours stay apart: the choices of one request have seeds that follow each other.
    return seed % _RANDOM_SEED


def _is_plain_greedy(settings: SamplingSettings) -> bool:
    return (
        not settings.temperature
        and not settings.logit_bias
        and settings.repetition_penalty == 1.0
        and not settings.frequency_penalty
        and not settings.presence_penalty
    )
