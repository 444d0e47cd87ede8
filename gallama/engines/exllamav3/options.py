"""From a model's spec to what exllamav3 takes; what that cannot express is refused.

The library's GB are 2**30 bytes, ours 10**9. Nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from gallama.config import ModelSpec
from gallama.engines.extra_arguments import read_extra_arguments
from gallama.engines.generators.settings import PAGE_TOKENS, check_draft_cache, check_gpus, whole_pages
from gallama.errors import InvalidConfig, NotEnoughMemory

MOST_FORCED_DRAFT = 15
"""Tokens of a forced run that are checked in one step: with the token before them, the widest step for which
the library has a CUDA graph."""
MOST_ROWS = 64
"""Tokens of all texts together that a step with drafts may have, at most."""

_GIGABYTE = 10**9
_GIBIBYTE = 2**30
_LEAST_RESERVE_GIBIBYTES = 0.5
_CACHE_BITS = {"FP16": None, "Q8": (8, 8), "Q6": (6, 6), "Q4": (4, 4)}


def _split_at_comma(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


_Bits = Annotated[int, Field(ge=2, le=8)]


class ExLlamaV3Options(BaseModel, extra="forbid", frozen=True):
    """The keys of `backend_extra_args`."""

    max_chunk_size: int = Field(2048, ge=2 * PAGE_TOKENS, le=65536, multiple_of=PAGE_TOKENS)
    prompt_step_ms: int = Field(200, ge=1, le=60_000)
    cache_bits: Annotated[tuple[_Bits, _Bits] | None, BeforeValidator(_split_at_comma)] = None
    ngram_match_min: int = Field(3, ge=1, le=64)
    tp_backend: Literal["native", "nccl"] = "native"
    warm_up: bool = True


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """How a cache is made."""

    tokens: int
    """Of all texts together; whole pages."""
    bits: tuple[int, int] | None
    """Of keys and of values; None: 16 bits each, not quantized."""


def read_options(spec: ModelSpec) -> ExLlamaV3Options:
    """The spec's `backend_extra_args`.

    Raises:
        InvalidConfig: an unknown key, a value that cannot be, or one that would not be used.
    """
    options = read_extra_arguments(ExLlamaV3Options, spec, backend="exllamav3")
    _refuse_unused(spec, options)
    return options


def _refuse_unused(spec: ModelSpec, options: ExLlamaV3Options) -> None:
    given = options.model_fields_set
    if "cache_bits" in given and spec.cache_quant is not None:
        raise InvalidConfig(
            "`backend_extra_args.cache_bits` and `cache_quant` both say how the cache is stored; leave one"
            " out."
        )
    if "tp_backend" in given and not spec.tp:
        raise InvalidConfig("`backend_extra_args.tp_backend` is used with `tp` only; leave it out.")
    if "ngram_match_min" in given and spec.speculation != "ngram":
        raise InvalidConfig(
            "`backend_extra_args.ngram_match_min` is used with `speculative` `ngram` only; leave it out."
        )


def choose_context_length(spec: ModelSpec, trained_context_length: int) -> int:
    """The longest text: what the spec says, else what the model was trained for and the cache holds.

    Raises:
        InvalidConfig: the spec asks for more than the model has positions.
    """
    if spec.max_seq_len is not None and spec.max_seq_len > trained_context_length:
        raise InvalidConfig(
            f"`max_seq_len` is {spec.max_seq_len}; the model's config.json says"
            f" {trained_context_length} positions. To stretch them, set `rope_scaling` and"
            " `max_position_embeddings` there, as the model's makers describe it."
        )
    return spec.max_seq_len or min(trained_context_length, spec.cache_size or trained_context_length)


def widest_draft(spec: ModelSpec, *, is_recurrent: bool) -> int:
    """Tokens that a text may have in a step beside the one that it is sure of.

    A recurrent model's cache must keep as many states back; for forced runs alone that is not worth it.
    """
    guessed = spec.most_draft_tokens
    return guessed if is_recurrent else max(guessed, MOST_FORCED_DRAFT)


def cache_options(
    spec: ModelSpec, options: ExLlamaV3Options, *, context_length: int, widest_draft: int
) -> CacheOptions:
    """The model's cache. Beside what it is to hold, a text needs room for a token and for a draft."""
    texts = max(spec.cache_size or 0, context_length)
    bits = options.cache_bits or _CACHE_BITS[spec.cache_quant or "FP16"]
    return CacheOptions(whole_pages(texts + 1 + widest_draft), bits)


def draft_cache_options(spec: ModelSpec, cache: CacheOptions, *, context_length: int) -> CacheOptions:
    """The draft model's cache: its pages are those of the model's.

    Raises:
        InvalidConfig: it is to have another size.
    """
    check_draft_cache(spec, context_length=context_length, backend="exllamav3")
    quant = spec.draft_cache_quant
    return CacheOptions(cache.tokens, cache.bits if quant is None else _CACHE_BITS[quant])


def placement(
    key: str,
    gigabytes: str | Sequence[float],
    *,
    reserve_gigabytes: float | None,
    free_bytes: Sequence[int],
    taken_bytes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Where a model goes, as arguments of the library's `Model.load`.

    Args:
        key: that says so, for errors: `gpus` or `draft_gpus`.
        gigabytes: its value.
        reserve_gigabytes: to be kept free on each GPU.
        free_bytes: on each GPU that this process sees.
        taken_bytes: by another model, of what `gigabytes` allows on each GPU.

    Raises:
        InvalidConfig: no GPU is to be used, or one that is not there.
        NotEnoughMemory: nothing is left on a GPU that is named.
    """
    if isinstance(gigabytes, str):
        reserve = _LEAST_RESERVE_GIBIBYTES
        if reserve_gigabytes is not None:
            reserve = reserve_gigabytes * _GIGABYTE / _GIBIBYTE
        return {"reserve_per_device": [reserve] * len(free_bytes)}
    check_gpus(key, gigabytes, seen=len(free_bytes), backend="exllamav3")
    taken = taken_bytes or [0] * len(free_bytes)
    kept = (reserve_gigabytes or 0.0) * _GIGABYTE
    room = [
        min(size * _GIGABYTE - taken[index], free_bytes[index] - kept) if size else 0.0
        for index, size in enumerate(gigabytes[: len(free_bytes)])
    ]
    for index, bytes_left in enumerate(room):
        if gigabytes[index] and bytes_left <= 0:
            raise NotEnoughMemory(
                f"Of the {gigabytes[index]:g} GB that `{key}` gives on GPU {index}, nothing is left to use:"
                f" {free_bytes[index] / _GIGABYTE:.1f} GB are free there."
            )
    return {"use_per_device": [bytes_left / _GIBIBYTE for bytes_left in room]}
