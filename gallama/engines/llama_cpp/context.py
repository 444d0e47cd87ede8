"""The KV cache as a set of sequences that share prefixes, and batches over them.

What a finished answer leaves in the cache stays there until its room is needed, so that the next request
with the same beginning computes only what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gallama.engines.llama_cpp.bindings import KvCacheFull

# A copied prefix shorter than this saves less than it costs to keep another sequence around.
MIN_SHARED_TOKENS = 4


class Kv(Protocol):
    """What of `bindings.NativeContext` is used here."""

    cells: int

    def decode(
        self,
        sequences: NDArray[np.int32],
        positions: NDArray[np.int32],
        tokens: NDArray[np.int32],
        wants_logits: NDArray[np.int8],
    ) -> None: ...
    def logits(self, batch_index: int) -> NDArray[np.float32]: ...
    def forget(self, sequence: int, from_position: int) -> None: ...
    def copy(self, source: int, target: int, length: int) -> None: ...
    def clear(self) -> None: ...


@dataclass(slots=True, eq=False)
class CachedSequence:
    """The tokens that the cache holds under one sequence id, in order."""

    id: int
    token_ids: list[int] = field(default_factory=list)
    is_busy: bool = False
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class BatchPart:
    """Tokens to append to one sequence; the last one's logits are wanted or not."""

    sequence: CachedSequence
    token_ids: Sequence[int]
    wants_logits: bool


class SequenceCache:
    """All sequences of one context. Belongs to the context's thread."""

    def __init__(self, kv: Kv, *, sequences: int, can_forget_partly: bool) -> None:
        self._kv = kv
        self._can_forget_partly = can_forget_partly
        self._sequences = [CachedSequence(id=number) for number in range(sequences)]
        self._clock = 0

    def acquire(self, token_ids: list[int], *, reuse: bool = True) -> CachedSequence:
        """A sequence to work on, holding as much as possible of the beginning of `token_ids`.

        At least the last token is left to compute: its logits are what the next one is chosen from.
        Without `reuse` the sequence is empty.
        """
        source, shared = self._longest_prefix(token_ids) if reuse else (None, 0)
        target = self._target(source, shared)
        self._move_prefix(source, target, shared)
        target.is_busy = True
        return target

    def shared_tokens(self, token_ids: list[int]) -> int:
        """How many tokens `acquire` would find in the cache."""
        return self._longest_prefix(token_ids)[1]

    def shorten(self, sequence: CachedSequence, length: int) -> None:
        """Forget what of a sequence stands behind its first `length` tokens."""
        if len(sequence.token_ids) > length:
            self._kv.forget(sequence.id, length)
            del sequence.token_ids[length:]

    def release(self, sequence: CachedSequence) -> None:
        """Work on the sequence has ended; its tokens stay in the cache while there is room."""
        self._clock += 1
        sequence.is_busy, sequence.last_used = False, self._clock

    def discard(self, sequence: CachedSequence) -> None:
        """Give the sequence's room back at once."""
        self._empty(sequence)
        self.release(sequence)

    def discard_all(self) -> None:
        """Forget everything, after a failed computation."""
        self._kv.clear()
        for sequence in self._sequences:
            sequence.token_ids.clear()
            sequence.is_busy = False

    def decode(self, parts: Sequence[BatchPart]) -> list[NDArray[np.float32] | None]:
        """Append tokens to sequences in one batch; idle sequences make room when it is needed.

        Returns:
            For each part the logits after its last token, shape (vocabulary size,), where it wants them.
            They are valid until the next decode.

        Raises:
            KvCacheFull: only busy sequences are left, and the batch does not fit beside them.
            DecodeFailed: the computation broke; `discard_all` is all that can be done.
        """
        sequences, positions, tokens, wants_logits = _to_arrays(parts)
        while True:
            try:
                self._kv.decode(sequences, positions, tokens, wants_logits)
                break
            except KvCacheFull:
                self._evict_one()
        for part in parts:
            part.sequence.token_ids.extend(part.token_ids)
        ends = np.cumsum([len(part.token_ids) for part in parts]) - 1
        return [
            self._kv.logits(int(end)) if part.wants_logits else None
            for part, end in zip(parts, ends, strict=True)
        ]

    @property
    def cached_tokens(self) -> int:
        """Tokens in all sequences, those of shared prefixes counted for each."""
        return sum(len(sequence.token_ids) for sequence in self._sequences)

    def _longest_prefix(self, token_ids: list[int]) -> tuple[CachedSequence | None, int]:
        best, shared = None, 0
        for sequence in self._sequences:
            length = self._reusable(sequence, token_ids)
            if length > shared:
                best, shared = sequence, length
        return (best, shared) if shared >= MIN_SHARED_TOKENS else (None, 0)

    def _reusable(self, sequence: CachedSequence, token_ids: list[int]) -> int:
        length = min(common_prefix(sequence.token_ids, token_ids), len(token_ids) - 1)
        if self._can_forget_partly or (length == len(sequence.token_ids) and not sequence.is_busy):
            return length
        return 0

    def _target(self, source: CachedSequence | None, shared: int) -> CachedSequence:
        """Where to work: on the source itself if little of it would be lost, else on a free sequence."""
        if source is not None and not source.is_busy and shared >= len(source.token_ids) // 2:
            return source
        idle = [sequence for sequence in self._sequences if not sequence.is_busy and sequence is not source]
        assert idle, "there are more sequences than slots"
        return min(idle, key=lambda sequence: (len(sequence.token_ids) > 0, sequence.last_used))

    def _move_prefix(self, source: CachedSequence | None, target: CachedSequence, shared: int) -> None:
        if source is target:
            self.shorten(target, shared)
            return
        self._empty(target)
        if source is not None:
            self._kv.copy(source.id, target.id, shared)
            target.token_ids = source.token_ids[:shared]

    def _evict_one(self) -> None:
        idle = [sequence for sequence in self._sequences if not sequence.is_busy and sequence.token_ids]
        if not idle:
            raise KvCacheFull
        self._empty(min(idle, key=lambda sequence: sequence.last_used))

    def _empty(self, sequence: CachedSequence) -> None:
        self._kv.forget(sequence.id, 0)
        sequence.token_ids = []


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences have in common at their start.

    By halves: comparing slices costs a tenth of looking at each token.
    """
    equal, limit = 0, min(len(one), len(other))
    while equal < limit:
        middle = (equal + limit + 1) // 2
        if one[equal:middle] == other[equal:middle]:
            equal = middle
        else:
            limit = middle - 1
    return equal


def _to_arrays(
    parts: Sequence[BatchPart],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int8]]:
    sequences: list[int] = []
    positions: list[int] = []
    tokens: list[int] = []
    wants_logits: list[int] = []
    for part in parts:
        count, start = len(part.token_ids), len(part.sequence.token_ids)
        sequences += [part.sequence.id] * count
        positions += range(start, start + count)
        tokens += part.token_ids
        wants_logits += [0] * (count - 1) + [int(part.wants_logits)]
    return (
        np.array(sequences, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        np.array(tokens, dtype=np.int32),
        np.array(wants_logits, dtype=np.int8),
    )
