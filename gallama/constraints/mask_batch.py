"""The masks of many sequences at once."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from gallama.constraints.llguidance import LLGuidanceState
from gallama.generation import State


class MaskBatch:
    """Computes what it can of a step's masks side by side, on other cores and outside of the GIL.

    That is for states of llguidance as they are; one inside of another state is asked when its turn comes.
    Used by one thread.
    """

    def __init__(self, vocabulary_size: int, most_sequences: int, *, threads: int) -> None:
        self._masks = np.zeros((most_sequences, (vocabulary_size + 31) // 32), dtype=np.int32)
        self._computed: list[bool] = []
        self._executor = llguidance.LLExecutor(num_threads=threads)

    def compute(self, states: Sequence[State | None]) -> None:
        """Begin a step with one state for each sequence; None: it is not constrained."""
        plain = [(state, row) for row, state in enumerate(states) if isinstance(state, LLGuidanceState)]
        if len(plain) < 2:
            plain = []
        self._computed = [False] * len(states)
        for _, row in plain:
            self._computed[row] = True
        if plain:
            matchers = [(state.matcher, row) for state, row in plain]
            self._executor.unsafe_compute_mask_ptr(
                matchers, self._masks.ctypes.data, self._masks.shape[1] * 4, len(self._masks)
            )

    def mask(self, row: int, state: State | None) -> NDArray[np.int32] | None:
        """The tokens that a sequence's state allows, as `State.mask` has them; None: all.

        Raises:
            ConstraintFailed, ConstraintTooComplex: as `State.mask`.
        """
        out: NDArray[np.int32] = self._masks[row]
        if state is None:
            return None
        if self._computed[row]:
            self._computed[row] = False  # good for one token: then the state has moved on
            assert isinstance(state, LLGuidanceState)
            state.refuse_error()
            return out
        return out if state.mask(out) else None
