"""How one text chooses its next token, by the library's own sampler.

The grammar comes first, then what changes logits, then what leaves tokens out, temperature last, so that the
same settings mean the same with every engine. The library does all of it in fused kernels as long as its
steps stand in the order that it knows: `min_p` in front of `top_k` and `top_p`. So where `top_p` and `min_p`
are both set, `top_p` is a share of what `min_p` has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exllamav3 import (
    CustomSampler,
    SS_Argmax,
    SS_BanTokens,
    SS_LogitBias,
    SS_MinP,
    SS_PresFreqP,
    SS_RepP,
    SS_Sample,
    SS_Temperature,
    SS_TopK,
    SS_TopP,
)

from gallama.engines.exllamav3.private import penalize_answer_only
from gallama.engines.logits import NEUTRAL
from gallama.generation import SamplingSettings

# Below this only ties are left to chance, and logits that are divided by it leave the range of the kernels.
_LEAST_TEMPERATURE = 1e-3


def make_sampler(settings: SamplingSettings, *, prompt_length: int, banned: Sequence[Any] = ()) -> Any:
    """The library's sampler for one leg of a text.

    Args:
        prompt_length: tokens in front of the answer, to which frequency and presence penalties belong.
        banned: steps of `ban`, to be shared by all texts without a grammar.
    """
    settings = settings.with_defaults(NEUTRAL)
    return CustomSampler([*banned, *_penalties(settings, prompt_length), *_choice(settings)])


def ban(token_ids: Sequence[int]) -> list[Any]:
    """Steps that keep tokens from being chosen."""
    return [SS_BanTokens(list(token_ids))] if token_ids else []


def _penalties(settings: SamplingSettings, prompt_length: int) -> list[Any]:
    """What changes logits. Repetition counts in prompt and answer, the others in the answer."""
    penalties: list[Any] = []
    if settings.logit_bias:
        penalties.append(SS_LogitBias(dict(settings.logit_bias)))
    if settings.repetition_penalty != 1.0:
        penalties.append(SS_RepP(rep_p=settings.repetition_penalty))
    if settings.presence_penalty or settings.frequency_penalty:
        step = SS_PresFreqP(pres_p=settings.presence_penalty or 0.0, freq_p=settings.frequency_penalty or 0.0)
        penalties.append(penalize_answer_only(step, prompt_length))
    return penalties


def _choice(settings: SamplingSettings) -> list[Any]:
    temperature = settings.temperature or 0.0
    if temperature < _LEAST_TEMPERATURE:
        return [SS_Argmax()]
    # Those that change nothing are dropped by the library.
    return [
        SS_MinP(settings.min_p or 0.0),
        SS_TopK(settings.top_k or 0),
        SS_TopP(1.0 if settings.top_p is None else settings.top_p),
        SS_Temperature(temperature),
        SS_Sample(),
    ]
