"""What exllamav3's CUDA extension computes between two forward passes, in numpy."""

from __future__ import annotations

import importlib.machinery
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_FAINT = 32.0
"""Natural logarithm: top-k and top-p drop what is less likely than the likeliest token by as much."""


class Extension(types.ModuleType):
    """The module `exllamav3_ext`."""

    FUSED_SAMPLER_MAX_BLOCKS = 128
    FUSED_SAMPLER_HIST_STRIDE = 2 * 1024 * 12 + 64

    def __init__(self, note: Callable[[str], None]) -> None:
        """
        Args:
            note: told of a call of what has no stand-in here.
        """
        super().__init__("exllamav3_ext")
        self._note = note
        # The library looks for a file that ends as extensions do before it compiles one.
        file = "exllamav3_ext" + importlib.machinery.EXTENSION_SUFFIXES[0]
        self.__spec__ = importlib.machinery.ModuleSpec("exllamav3_ext", loader=_NO_LOADER, origin=file)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*args: Any, **kwargs: Any) -> None:
            self._note(f"{name} has no stand-in")
            raise NotImplementedError(name)

        return kernel

    @staticmethod
    def generator_stage_decode(
        arena: Any,
        width: int,
        block_indices: list[Any],
        lengths: list[int],
        rope_offsets: list[int],
        batch_ids: Any,
        sequences: list[Any],
        page_sequences: list[Any],
        page_offsets: list[int],
    ) -> None:
        """Lay out one row for each text: its pages, its length, and (one token each) the token to read."""
        assert arena.dtype == torch.int32
        assert not rope_offsets
        texts = len(block_indices)
        tables = arena[: texts * width].view(texts, width)
        tables.zero_()
        for row, pages in enumerate(block_indices):
            assert pages.dtype == torch.int32
            count = min(pages.numel(), width)
            tables[row, :count] = pages.flatten()[:count]
            arena[texts * width + row] = lengths[row]
        for row, (ids, page, offset) in enumerate(zip(sequences, page_sequences, page_offsets, strict=True)):
            assert ids.dtype == torch.int64, "token tensors must be int64"
            batch_ids[row, 0] = page[0, offset] = ids[0, lengths[row]]

    @staticmethod
    def count_match_tensor(page: Any, ids: Any, most: int) -> int:
        most = min(most, page.numel(), ids.shape[1])
        differ = (page.flatten()[:most] != ids.flatten()[:most]).nonzero()
        return int(differ[0]) if len(differ) else most

    @staticmethod
    def cache_rotate(cache: Any, order: Any, spare: Any) -> None:
        for to, source in order.view(-1, 2).tolist():
            (cache[to] if to >= 0 else spare).copy_(cache[source] if source >= 0 else spare)

    @staticmethod
    def apply_logit_bitmask(logits: Any, out: Any, bits: Any) -> None:
        assert bits.dtype == torch.int32
        out.copy_(torch.where(_allowed(bits, logits.shape[1]), logits, -torch.inf))

    @staticmethod
    def apply_rep_pens(
        logits: Any, out: Any, past_ids: Any, penalty: float, sustained: int, decaying: int
    ) -> None:
        assert decaying == 0
        assert past_ids.dtype == torch.int64
        values = logits.float()
        weakened = torch.where(values > 0, values / penalty, values * penalty)
        seen = torch.zeros(values.shape[1], dtype=torch.bool)
        seen[past_ids[0, max(0, past_ids.shape[1] - sustained) :]] = True
        out.copy_(torch.where(seen, weakened, values))

    @staticmethod
    def apply_pres_freq_pens(
        logits: Any,
        out: Any,
        past_ids: Any,
        presence: float,
        frequency: float,
        sustained: int,
        decaying: int,
    ) -> None:
        assert decaying == 0
        past = past_ids[0, max(0, past_ids.shape[1] - sustained) :]
        counts = torch.bincount(past, minlength=logits.shape[1]).float()
        out.copy_(logits.float() - counts * frequency - (counts > 0) * presence)

    @staticmethod
    def fused_sampler(
        logits: Any,
        mask: Any,
        bits: Any,
        out: Any,
        workspace: Any,
        size: int,
        inverse_temperature: float,
        min_p_log: float,
        seed: int,
        mode: int,
        filters: int,
        top_k: int,
        top_p: float,
        inverse_filter_temperature: float,
        histogram: Any,
    ) -> None:
        """Choose one token.

        Args:
            mode: 0 the likeliest, 1 any, 2 any that min-p keeps, 3 any that the filters keep.
            filters: the sum of 1 for top-k, 2 for top-p and 4 for min-p.
        """
        assert logits.shape[0] == 1
        assert logits.is_contiguous()
        assert 0 < size <= logits.shape[1]
        assert mask is None
        values = logits[0, :size].float()
        if bits is not None:
            assert bits.dtype == torch.int32
            assert bits.shape[1] * 32 >= size
            values = torch.where(_allowed(bits, size), values, -torch.inf)
        # What is no number is less than all others; if there is nothing else, token 0 it is.
        values = values.numpy().astype(np.float64)
        values[np.isnan(values)] = -np.inf
        if mode == 2:
            values[values < values.max() + min_p_log] = -np.inf
        elif mode == 3:
            _filter(values, min_p_log, filters, top_k, top_p, inverse_filter_temperature)
        if mode:
            noise = np.random.Generator(np.random.Philox(key=seed)).gumbel(size=size)
            values = values * inverse_temperature + noise
        out[0, 0] = int(values.argmax())

    class BC_SAM:
        """The longest end of a text that stands in it before, as (start, end) of its first such place."""

        def __init__(self) -> None:
            self._length = 0
            self._matched = 0

        def accept_tensor(self, tokens: Any) -> tuple[int, int]:
            text = "".join(map(chr, tokens.flatten().tolist()))
            added, self._length = len(text) - self._length, len(text)
            # A match grows by what is added, at most.
            for length in range(min(self._matched + added, len(text) - 1), 0, -1) if added else ():
                place = text.find(text[-length:], 0, len(text) - 1)
                if place >= 0:
                    self._matched = length
                    return place, place + length
            self._matched = 0
            return -1, -1


_NO_LOADER: Any = object()


def _allowed(bits: Any, size: int) -> Any:
    """Of packed bits: which of the first `size` tokens are allowed; what the mask is too short for is not."""
    unpacked = np.unpackbits(bits.numpy().view(np.uint8).ravel(), bitorder="little")[:size]
    allowed = np.zeros(size, bool)
    allowed[: len(unpacked)] = unpacked
    return torch.from_numpy(allowed)


def _filter(
    values: NDArray[np.float64],
    min_p_log: float,
    filters: int,
    top_k: int,
    top_p: float,
    inverse_temperature: float,
) -> None:
    """Strike out in place, in the order min-p, top-k, top-p; tokens as likely as the last kept one stay."""
    best = values.max()
    if filters & 4:
        values[values < best + min_p_log] = -np.inf
    values[(best - values) * inverse_temperature >= _FAINT] = -np.inf
    if filters & 1 and top_k < np.isfinite(values).sum():
        values[values < np.sort(values)[-top_k]] = -np.inf
    if filters & 2:
        order = np.argsort(-values, kind="stable")
        weights = np.exp((values[order] - best) * inverse_temperature)
        last = np.searchsorted(np.cumsum(weights), top_p * weights.sum())
        values[values < values[order[min(int(last), len(order) - 1)]]] = -np.inf
