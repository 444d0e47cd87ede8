"""Rows of logits and masks for tests that choose tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SIZE = 100  # no multiple of 32, as few vocabularies are


def logits_with(**values: float) -> NDArray[np.float32]:
    """Logits of zero but for some, given as t7=2.5."""
    logits = np.zeros(SIZE, dtype=np.float32)
    for name, value in values.items():
        logits[int(name[1:])] = value
    return logits


def mask_of(token_ids: Sequence[int], size: int = SIZE) -> NDArray[np.int32]:
    bits = np.zeros((size + 31) // 32 * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
