"""A KV cache in memory, with a model that is a function: what llama.cpp does, without llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gallama.engines.llama_cpp.bindings import DecodeFailed, KvCacheFull


class MemoryKv:
    """Works as llama.cpp's unified cache: copies share cells, and a cell is free with its last user."""

    def __init__(
        self,
        cells: int,
        *,
        can_forget_partly: bool = True,
        shares_cells: bool = True,
        model: Callable[[Sequence[int]], NDArray[np.float32]] = lambda tokens: np.array(tokens, np.float32),
    ) -> None:
        """
        Args:
            cells: of all sequences together, or of each where they do not share them.
            model: the logits after some tokens; if not given the tokens themselves, to see what it saw.
        """
        self.cells = cells
        self.shares_cells = shares_cells
        self.batches: list[list[int]] = []
        """The sequence of each token, by batch."""
        self.restored_tokens = 0
        self.is_broken = False
        self._can_forget_partly = can_forget_partly
        self._model = model
        self._texts: dict[int, list[tuple[int, int]]] = {}
        """By sequence: the (cell, token) at each position."""
        self._next_cell = 0
        self._rows: list[NDArray[np.float32] | None] = []

    def decode(
        self,
        sequences: NDArray[np.int32],
        positions: NDArray[np.int32],
        tokens: NDArray[np.int32],
        wants_logits: NDArray[np.int8],
    ) -> None:
        if self.is_broken:
            raise DecodeFailed
        self._refuse_overflow(sequences.tolist())
        self.batches.append(sequences.tolist())
        self._rows = []
        for sequence, position, token, wanted in zip(sequences, positions, tokens, wants_logits, strict=True):
            text = self._texts.setdefault(int(sequence), [])
            assert position == len(text), "a token goes behind the last one"
            text.append((self._next_cell, int(token)))
            self._next_cell += 1
            self._rows.append(self._model(self.tokens(int(sequence))) if wanted else None)

    def logits(self, batch_index: int) -> NDArray[np.float32]:
        row = self._rows[batch_index]
        assert row is not None, "logits exist only where the batch asked for them"
        return row

    def forget(self, sequence: int, from_position: int) -> None:
        assert self._can_forget_partly or from_position == 0
        text = self._texts.get(sequence, [])
        assert from_position <= len(text)
        del text[from_position:]

    def copy(self, source: int, target: int, length: int) -> None:
        assert self._can_forget_partly
        assert self.shares_cells
        assert not self._texts.get(target), "only an empty sequence is copied to"
        assert length <= len(self._texts[source])
        self._texts[target] = self._texts[source][:length]

    def save(self, sequence: int) -> NDArray[np.uint8]:
        return np.array(self.tokens(sequence), dtype=np.int32).view(np.uint8)

    def restore(self, sequence: int, snapshot: NDArray[np.uint8]) -> None:
        assert not self._texts.get(sequence), "only an empty sequence is restored to"
        tokens = snapshot.view(np.int32).tolist()
        self._refuse_overflow([sequence] * len(tokens))
        self._texts[sequence] = [(self._next_cell + place, token) for place, token in enumerate(tokens)]
        self._next_cell += len(tokens)
        self.restored_tokens += len(tokens)

    def clear(self, *, zero: bool = True) -> None:
        self._texts.clear()

    def _refuse_overflow(self, sequences: Sequence[int]) -> None:
        """Refuse to add a token to each of these sequences where there are not enough cells."""
        if self.shares_cells:
            is_full = self.used_cells + len(sequences) > self.cells
        else:
            is_full = any(
                len(self._texts.get(sequence, [])) + sequences.count(sequence) > self.cells
                for sequence in set(sequences)
            )
        if is_full:
            raise KvCacheFull

    def tokens(self, sequence: int) -> list[int]:
        return [token for _, token in self._texts.get(sequence, [])]

    @property
    def filled_sequences(self) -> set[int]:
        return {sequence for sequence, text in self._texts.items() if text}

    @property
    def held_tokens(self) -> int:
        """Tokens in all sequences, those of shared cells counted for each."""
        return sum(map(len, self._texts.values()))

    @property
    def used_cells(self) -> int:
        return len({cell for text in self._texts.values() for cell, _ in text})

    @property
    def computed_tokens(self) -> int:
        return sum(map(len, self.batches))
