"""What a row of logits and a grammar's mask say of the next token. Nothing here knows an engine's library."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gallama.generation import SamplingSettings, TokenLogprob

NEUTRAL = SamplingSettings(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
)
"""How to sample where neither the request nor the model's settings say so."""


def allowed_tokens(mask: NDArray[np.int32], vocabulary_size: int) -> NDArray[np.intp]:
    """The token ids whose bits are set, in order.

    A grammar mostly allows either a handful of tokens, found word by word, or nearly all of them.
    """
    words = np.flatnonzero(mask)
    if len(words) > len(mask) // 4:
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocabulary_size)
        return np.flatnonzero(bits)
    bits = np.unpackbits(mask[words].view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    rows, columns = np.nonzero(bits)
    allowed = words[rows] * 32 + columns
    return allowed[allowed < vocabulary_size]


def log_probabilities(logits: NDArray[np.float32], token_id: int, alternatives: int) -> TokenLogprob:
    """The log probability of a token and of the likeliest alternatives, before temperature and grammar."""
    shifted = logits.astype(np.float64) - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    best = (
        np.argpartition(shifted, -alternatives)[-alternatives:]
        if alternatives
        else np.zeros(0, dtype=np.intp)
    )
    best = best[np.argsort(-shifted[best])]
    return TokenLogprob(
        token_id, float(shifted[token_id]), tuple((int(token), float(shifted[token])) for token in best)
    )
