"""The KV cache as a set of sequences that share prefixes, and batches over them.

What a finished answer leaves stays, so that the next request with the same beginning computes only what is
new: in the cache while it costs nothing there, then on a shelf, outside of what a step looks at.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gallama.engines.llama_cpp.bindings import DecodeFailed, KvCacheFull

logger = logging.getLogger(__name__)

# A copied prefix shorter than this saves less than it costs to keep another sequence around.
MIN_SHARED_TOKENS = 4

# Copying a snapshot costs a thousandth of computing its tokens on a CPU, and a tenth on a GPU.
_MOST_COPIED_PER_SHARED = 10

# Less than this is computed sooner than it is worth keeping.
MIN_SHELVED_TOKENS = 16

# Where all sequences share their cells, a step looks at each of them, also at those of nobody: 1,000 idle
# cells make it 6 % slower. So many may stay beside work.
IDLE_TOKENS_BESIDE_WORK = 512


class Kv(Protocol):
    """What of `bindings.NativeContext` is used here."""

    cells: int
    shares_cells: bool
    """Whether all sequences use one pool of cells, or each its own part of them."""

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
    def save(self, sequence: int) -> NDArray[np.uint8]: ...
    def restore(self, sequence: int, snapshot: NDArray[np.uint8]) -> None: ...
    def clear(self, *, zero: bool = True) -> None: ...


@dataclass(slots=True, eq=False)
class CachedSequence:
    """The tokens that the cache holds under one sequence id, in order."""

    id: int
    token_ids: list[int] = field(default_factory=list)
    is_busy: bool = False
    last_used: int = 0
    least_tokens: int = 0
    """It must not be shortened to fewer: of what stands before, a snapshot may have held nothing."""


@dataclass(slots=True, eq=False)
class _ShelvedSequence:
    """A finished sequence outside of the cache."""

    token_ids: list[int]
    snapshot: NDArray[np.uint8]
    least_tokens: int


@dataclass(frozen=True, slots=True)
class BatchPart:
    """Tokens to append to one sequence."""

    sequence: CachedSequence
    token_ids: Sequence[int]
    logits: int
    """Of how many tokens at the end the logits are wanted."""


class SequenceCache:
    """All sequences of one context. Belongs to the context's thread."""

    def __init__(
        self,
        kv: Kv,
        *,
        sequences: int,
        can_forget_partly: bool,
        has_window: bool = False,
        shelf_tokens: int = 0,
    ) -> None:
        """
        Args:
            can_forget_partly: whether the end of a sequence can be dropped.
            has_window: a snapshot holds of some layers only the last tokens, so that it cannot be shortened.
            shelf_tokens: how many tokens of finished sequences are kept in the machine's memory.
        """
        assert kv.shares_cells or (can_forget_partly and not has_window)
        self._kv = kv
        self.can_forget_partly = can_forget_partly
        self._has_window = has_window
        self._sequences = [CachedSequence(id=number) for number in range(sequences)]
        self._shelf = _Shelf(shelf_tokens, keeps_prefixes=has_window or not can_forget_partly)
        self._clock = 0

    def acquire(self, token_ids: list[int], *, reuse: bool = True) -> CachedSequence:
        """A sequence to work on, holding as much as possible of the beginning of `token_ids`.

        At least the last token is left to compute: its logits are what the next one is chosen from.
        Without `reuse` the sequence is empty.
        """
        source, shared = self._longest_prefix(token_ids) if reuse else (None, 0)
        return self._start(source, shared)

    def fork(self, source: CachedSequence, length: int) -> CachedSequence:
        """A sequence to work on that holds the first `length` tokens of another, the last one too."""
        assert self.can_forget_partly
        return self._start(source, length)

    def shared_tokens(self, token_ids: list[int]) -> int:
        """How many tokens `acquire` would find."""
        return self._longest_prefix(token_ids)[1]

    def shared_with_busy(self, busy: list[int], token_ids: list[int]) -> int:
        """How many of `token_ids` a sequence at work will share that has read all of `busy`."""
        length = min(common_prefix(busy, token_ids), len(token_ids) - 1)
        is_copied_at_once = self._kv.shares_cells
        pays = is_copied_at_once or length * _MOST_COPIED_PER_SHARED >= len(busy)
        return length if self.can_forget_partly and pays else 0

    def shorten(self, sequence: CachedSequence, length: int) -> None:
        """Forget what of a sequence stands behind its first `length` tokens."""
        if len(sequence.token_ids) > length:
            self._kv.forget(sequence.id, length)
            del sequence.token_ids[length:]

    def release(self, sequence: CachedSequence) -> None:
        """Work on the sequence has ended; its tokens are kept while there is room."""
        self._clock += 1
        sequence.is_busy, sequence.last_used = False, self._clock
        self._shelve_surplus()

    def discard(self, sequence: CachedSequence) -> None:
        """Give the sequence's room back at once."""
        self._empty(sequence)
        self.release(sequence)

    def shelve_all(self) -> None:
        """Leave the cache as empty as it was at first, while nobody works."""
        for sequence in self._filled_idle():
            self._shelve(sequence)
        self._kv.clear(zero=False)

    def discard_all(self) -> None:
        """Forget what is in the cache, after a failed computation."""
        self._kv.clear()
        for sequence in self._sequences:
            sequence.token_ids, sequence.least_tokens = [], 0
            sequence.is_busy = False

    def decode(self, parts: Sequence[BatchPart]) -> None:
        """Append tokens to sequences in one batch; idle sequences make room when it is needed.

        A GPU may still be at work on it when this returns.

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

    def logits(self, parts: Sequence[BatchPart]) -> list[list[NDArray[np.float32]]]:
        """What the last batch, made of these parts, has brought.

        Returns:
            For each part the logits after its last `logits` tokens, each of shape (vocabulary size,); valid
            until the next decode.
        """
        rows, end = [], 0
        for part in parts:
            end += len(part.token_ids)
            rows.append([self._kv.logits(index) for index in range(end - part.logits, end)])
        return rows

    def probe(self, token_id: int) -> None:
        """Compute a token behind what an idle sequence holds, and forget it: what is kept stays.

        Raises:
            KvCacheFull, DecodeFailed: as `decode`.
        """
        sequence = min(
            (each for each in self._sequences if not each.is_busy), key=lambda each: len(each.token_ids)
        )
        if not self.can_forget_partly:
            self._shelve(sequence)
        while True:
            length = len(sequence.token_ids)
            part = BatchPart(sequence, [token_id], logits=1)
            try:
                self._kv.decode(*_to_arrays([part]))
                break
            except KvCacheFull:
                self._evict_one()
        logits = self._kv.logits(0)
        self._kv.forget(sequence.id, length)
        if np.isnan(logits).any():
            raise DecodeFailed("what was computed are no numbers")

    @property
    def shares_cells(self) -> bool:
        """Whether all sequences use one pool of cells, or each its own part of them."""
        return self._kv.shares_cells

    @property
    def cached_tokens(self) -> int:
        """Tokens in all sequences, those of shared prefixes counted for each."""
        return sum(len(sequence.token_ids) for sequence in self._sequences)

    @property
    def shelved_tokens(self) -> int:
        return self._shelf.tokens

    def _longest_prefix(self, token_ids: list[int]) -> tuple[CachedSequence | _ShelvedSequence | None, int]:
        best: CachedSequence | _ShelvedSequence | None = None
        shared = MIN_SHARED_TOKENS - 1
        sources: list[CachedSequence | _ShelvedSequence] = [*self._sequences, *self._shelf.sequences]
        for source in sources:
            length = self._reusable(source, token_ids)
            if length > shared:
                best, shared = source, length
        return (best, shared) if best is not None else (None, 0)

    def _reusable(self, source: CachedSequence | _ShelvedSequence, token_ids: list[int]) -> int:
        length = min(common_prefix(source.token_ids, token_ids), len(token_ids) - 1)
        is_whole, is_busy = length == len(source.token_ids), _is_busy(source)
        if not self.can_forget_partly:
            return length if is_whole and not is_busy else 0
        if length < source.least_tokens:
            return 0
        is_copied_at_once = not isinstance(source, _ShelvedSequence) and (
            self._kv.shares_cells or not is_busy
        )
        if not is_copied_at_once and length * _MOST_COPIED_PER_SHARED < len(source.token_ids):
            return 0
        return length

    def _start(self, source: CachedSequence | _ShelvedSequence | None, shared: int) -> CachedSequence:
        target = self._target(source, shared)
        self._move_prefix(source, target, shared)
        target.is_busy = True
        self._shelve_surplus()
        return target

    def _target(self, source: CachedSequence | _ShelvedSequence | None, shared: int) -> CachedSequence:
        """Where to work: on the source itself if little of it would be lost, else on a free sequence."""
        idle = [sequence for sequence in self._sequences if not sequence.is_busy]
        assert idle, "there are never fewer sequences than slots"
        others = [sequence for sequence in idle if sequence is not source]
        loses_little = source is not None and shared >= len(source.token_ids) // 2
        if isinstance(source, CachedSequence) and source in idle and (loses_little or not others):
            return source
        busy = {sequence.id for sequence in self._sequences if sequence.is_busy}

        def cost(sequence: CachedSequence) -> tuple[bool, bool, int]:
            # Only neighbours are computed together where each has its own cells.
            is_apart = not self._kv.shares_cells and not busy & {sequence.id - 1, sequence.id + 1}
            return is_apart, len(sequence.token_ids) > 0, sequence.last_used

        return min(others, key=cost)

    def _move_prefix(
        self, source: CachedSequence | _ShelvedSequence | None, target: CachedSequence, shared: int
    ) -> None:
        if source is target:
            self.shorten(target, shared)
            return
        if isinstance(source, _ShelvedSequence):
            self._shelf.touch(source)
        self._shelve(target)
        if isinstance(source, CachedSequence) and self._kv.shares_cells:
            self._kv.copy(source.id, target.id, shared)
            target.token_ids, target.least_tokens = source.token_ids[:shared], source.least_tokens
        elif isinstance(source, CachedSequence):
            self._restore(target, self._snapshot(source), shared)
        elif source is not None:
            self._restore(target, source, shared)

    def _restore(self, target: CachedSequence, source: _ShelvedSequence, shared: int) -> None:
        """Put the beginning of a snapshot into an empty sequence; where there is no room, nothing."""
        while True:
            try:
                self._kv.restore(target.id, source.snapshot)
                break
            except KvCacheFull:
                try:
                    self._evict_one()
                except KvCacheFull:
                    return
        target.token_ids, target.least_tokens = source.token_ids.copy(), source.least_tokens
        self.shorten(target, shared)

    def _snapshot(self, sequence: CachedSequence) -> _ShelvedSequence:
        least_tokens = len(sequence.token_ids) if self._has_window else 0
        return _ShelvedSequence(sequence.token_ids, self._kv.save(sequence.id), least_tokens)

    def _shelve_surplus(self) -> None:
        """Keep idle sequences out of the way of those who work."""
        busy = [sequence for sequence in self._sequences if sequence.is_busy]
        if not busy or not self._kv.shares_cells:
            return
        idle = sorted(self._filled_idle(), key=lambda sequence: sequence.last_used, reverse=True)
        room = IDLE_TOKENS_BESIDE_WORK
        for sequence in idle:
            in_use = max(common_prefix(sequence.token_ids, other.token_ids) for other in busy)
            room -= len(sequence.token_ids) - in_use
            if room < 0:
                self._shelve(sequence)

    def _evict_one(self) -> None:
        idle = self._filled_idle()
        if not idle:
            raise KvCacheFull
        self._shelve(min(idle, key=lambda sequence: sequence.last_used))

    def _filled_idle(self) -> list[CachedSequence]:
        return [sequence for sequence in self._sequences if not sequence.is_busy and sequence.token_ids]

    def _shelve(self, sequence: CachedSequence) -> None:
        """Empty an idle sequence, and keep what it held if that is worth it."""
        if self._shelf.wants(sequence.token_ids):
            try:
                self._shelf.add(self._snapshot(sequence))
            except (MemoryError, AssertionError):  # it was kept only to save time
                logger.exception("a sequence of %d tokens could not be kept", len(sequence.token_ids))
        self._empty(sequence)

    def _empty(self, sequence: CachedSequence) -> None:
        self._kv.forget(sequence.id, 0)
        sequence.token_ids, sequence.least_tokens = [], 0


class _Shelf:
    """Snapshots of finished sequences, the least recently used in front."""

    def __init__(self, most_tokens: int, *, keeps_prefixes: bool) -> None:
        """
        Args:
            keeps_prefixes: a longer sequence does not stand for its own beginning.
        """
        self.sequences: list[_ShelvedSequence] = []
        self._most_tokens = most_tokens
        self._keeps_prefixes = keeps_prefixes

    @property
    def tokens(self) -> int:
        return sum(len(shelved.token_ids) for shelved in self.sequences)

    def wants(self, token_ids: list[int]) -> bool:
        """Whether it would gain by them; if it has them already, they count as used now."""
        if not MIN_SHELVED_TOKENS <= len(token_ids) <= self._most_tokens:
            return False
        for shelved in self.sequences:
            shared = common_prefix(shelved.token_ids, token_ids)
            if shared == len(token_ids) and (not self._keeps_prefixes or shared == len(shelved.token_ids)):
                self.touch(shelved)
                return False
        return True

    def add(self, new: _ShelvedSequence) -> None:
        if not self._keeps_prefixes:
            self.sequences = [
                shelved
                for shelved in self.sequences
                if common_prefix(shelved.token_ids, new.token_ids) < len(shelved.token_ids)
            ]
        self.sequences.append(new)
        while self.tokens > self._most_tokens:
            del self.sequences[0]

    def touch(self, shelved: _ShelvedSequence) -> None:
        self.sequences.remove(shelved)
        self.sequences.append(shelved)


def _is_busy(source: CachedSequence | _ShelvedSequence) -> bool:
    return isinstance(source, CachedSequence) and source.is_busy


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
        wants_logits += [0] * (count - part.logits) + [1] * part.logits
    return (
        np.array(sequences, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        np.array(tokens, dtype=np.int32),
        np.array(wants_logits, dtype=np.int8),
    )
