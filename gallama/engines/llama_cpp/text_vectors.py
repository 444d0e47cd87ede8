"""A few texts in, a vector of each out: one forward pass where that is right, several where it is cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gallama.engines.llama_cpp.bindings import NativeContext


class TextVectors:
    """Computes vectors with one context. Belongs to one thread."""

    def __init__(self, context: NativeContext, *, width: int, batch_tokens: int, by_last_token: bool) -> None:
        """
        Args:
            width: numbers that the model makes of a text.
            batch_tokens: tokens of one forward pass, where a text may be read in pieces.
            by_last_token: whether a text's last token, which has seen all others, is all that counts.
        """
        self.passes = 0
        """Forward passes so far."""
        self._context = context
        self._width = width
        self._batch_tokens = batch_tokens
        self._by_last_token = by_last_token

    def compute(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """What the model makes of each text, shape (texts, width), as it comes out of the model.

        Args:
            texts: token ids, at least one each. No more of them than the context has sequences, nor more
                tokens than its batch, unless the last one is enough.

        Raises:
            DecodeFailed: the computation broke.
        """
        tokens = _Tokens.of(texts)
        self._context.clear(zero=False)
        if self._by_last_token:
            tokens = self._read_all_but_last(tokens)
        self._decode(tokens)
        return self._context.vectors(len(texts), self._width)

    def _read_all_but_last(self, tokens: _Tokens) -> _Tokens:
        """Read the texts into the cache, in pieces, and leave their last tokens.

        A pass that makes vectors takes each of its tokens to the end, through the large matrix to the
        vocabulary too, and keeps the logits of all: here these are a few tokens, not thousands.
        """
        rest = tokens.where(~tokens.are_last)
        self._context.make_vectors(enabled=False)
        try:
            for start in range(0, len(rest.ids), self._batch_tokens):
                self._decode(rest.where(slice(start, start + self._batch_tokens)), wants_output=False)
        finally:
            self._context.make_vectors(enabled=True)
        return tokens.where(tokens.are_last)

    def _decode(self, tokens: _Tokens, *, wants_output: bool = True) -> None:
        self.passes += 1
        wanted = np.full(len(tokens.ids), wants_output, dtype=np.int8)
        self._context.decode(tokens.sequences, tokens.positions, tokens.ids, wanted)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of several texts, one after the other; each array has an entry for each."""

    ids: NDArray[np.int32]
    sequences: NDArray[np.int32]
    positions: NDArray[np.int32]
    are_last: NDArray[np.bool_]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> _Tokens:
        lengths = np.array([len(text) for text in texts], dtype=np.int32)
        sequences = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        return cls(
            ids=np.concatenate([np.asarray(text, dtype=np.int32) for text in texts]),
            sequences=sequences,
            positions=positions,
            are_last=positions == lengths[sequences] - 1,
        )

    def where(self, chosen: NDArray[np.bool_] | slice) -> _Tokens:
        return _Tokens(
            self.ids[chosen], self.sequences[chosen], self.positions[chosen], self.are_last[chosen]
        )
