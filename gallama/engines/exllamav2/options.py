"""From a model's spec to what exllamav2 takes; what that cannot express is refused.

The library's GB are 2**30 bytes, ours 10**9. Nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, Field

from gallama.config import ModelSpec
from gallama.engines.extra_arguments import read_extra_arguments
from gallama.engines.generators.settings import PAGE_TOKENS, check_gpus, whole_pages
from gallama.errors import InvalidConfig

LEG_TOKENS = 512
"""Tokens that an answer grows by before it makes room for others that wait."""
MOST_FORCED_DRAFT = 8
"""Tokens of a run that the grammar forces which are checked in one step, where nothing else is guessed."""

_GIGABYTE = 10**9
_GIBIBYTE = 2**30
# What the library keeps free of its own accord: on the first GPU, and on each of the others.
_LEAST_RESERVE_BYTES = (192 * 2**20, 64 * 2**20)


class ExLlamaV2Options(BaseModel, extra="forbid", frozen=True):
    """The keys of `backend_extra_args`."""

    max_chunk_size: int = Field(2048, ge=PAGE_TOKENS, le=16384, multiple_of=PAGE_TOKENS)
    prompt_step_ms: int = Field(200, ge=1, le=60_000)
    flash_attn: bool = True
    rope_scale: float | None = Field(None, gt=0, le=1000)
    rope_alpha: float | None = Field(None, gt=0, le=1000)

    @property
    def stretches_positions(self) -> bool:
        return self.rope_scale is not None or self.rope_alpha is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotations:
    """What a config.json says of the positions that a model knows."""

    trained_length: int
    is_yarn: bool = False
    """Whether the library computes them by the length of its table."""
    short_length: int | None = None
    """Of a LongRoPE model: all positions have another meaning once the longest text is longer than this, and
    are computed by the length of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How long and how wide the library's buffers are, in tokens."""

    context_length: int
    """Of prompt and answer of one text."""
    positions: int
    """That the table of rotations has."""
    slots: int
    """Texts side by side."""
    drafts: int
    """That a text may have in a step beside the token that it is sure of."""
    chunk: int
    """Of a prompt in one step; whole pages."""
    step: int
    """Of all texts together in one step."""
    cache: int
    """Of all texts together; whole pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a model goes."""

    reserve_bytes: tuple[int, ...]
    """To be left free on each GPU that this process sees, while they are filled in order."""
    hidden: frozenset[int] = frozenset()
    """GPUs that it is kept from."""

    @property
    def has_gap(self) -> bool:
        """Whether a GPU is hidden that stands before one to be used."""
        used = [index for index in range(len(self.reserve_bytes)) if index not in self.hidden]
        return used != list(range(len(used)))


def read_options(spec: ModelSpec) -> ExLlamaV2Options:
    """The spec's `backend_extra_args`.

    Raises:
        InvalidConfig: an unknown key, or a value that cannot be.
    """
    return read_extra_arguments(ExLlamaV2Options, spec, backend="exllamav2")


def choose_context_length(
    spec: ModelSpec, options: ExLlamaV2Options, rotations: Rotations, *, drafts: int
) -> int:
    """The longest text: what the spec says, else what the model was trained for and the cache holds.

    Raises:
        InvalidConfig: the spec asks for more than the model has positions.
    """
    trained, short = rotations.trained_length, rotations.short_length
    length = spec.max_seq_len or min(trained, spec.cache_size or trained)
    if length > trained and not options.stretches_positions:
        raise InvalidConfig(
            f"`max_seq_len` is {length}; the model has {trained} positions. What stretches them is"
            " `backend_extra_args.rope_scale` or `rope_alpha`."
        )
    if short is None or not short - drafts < length <= short:
        return length
    if spec.max_seq_len is None:
        return short - drafts
    raise InvalidConfig(
        f"`max_seq_len` is {length}; with the {drafts} tokens that may be guessed ahead, that is beyond the"
        f" {short} from where LongRoPE changes all positions of a text. Set it to {short - drafts} at most,"
        f" or to more than {short}."
    )


def choose_drafts(spec: ModelSpec, options: ExLlamaV2Options) -> int:
    """Tokens that a text may have in a step beside the one that it is sure of.

    Raises:
        InvalidConfig: so many for so many texts do not fit a step.
    """
    slots, most = spec.max_concurrent_requests, options.max_chunk_size
    if spec.speculation == "off":
        return max(1, min(MOST_FORCED_DRAFT, most // slots - 1))
    if slots * (1 + spec.most_draft_tokens) > most:
        raise InvalidConfig(
            f"{slots} requests (`max_concurrent_requests`) with {spec.most_draft_tokens} tokens guessed ahead"
            f" (`num_draft_tokens`) take more than a step has (`backend_extra_args.max_chunk_size`: {most})."
            " Lower the first or the second, or raise the third."
        )
    return spec.most_draft_tokens


def choose_sizes(spec: ModelSpec, options: ExLlamaV2Options, rotations: Rotations, *, paged: bool) -> Sizes:
    """
    Args:
        paged: whether several texts can be computed side by side.

    Raises:
        InvalidConfig: the spec asks for more than the model or a step has.
    """
    drafts = choose_drafts(spec, options)
    context_length = choose_context_length(spec, options, rotations, drafts=drafts)
    slots = spec.max_concurrent_requests if paged else 1
    texts = whole_pages(max(spec.cache_size or 0, context_length) + drafts)
    chunk = min(options.max_chunk_size, texts)
    step = max(chunk, slots * (1 + drafts))
    positions = max(context_length + drafts, step)
    if rotations.is_yarn or (rotations.short_length is not None and context_length > rotations.short_length):
        positions = max(positions, rotations.trained_length)
    elif rotations.short_length is not None:
        positions = min(positions, rotations.short_length)
    step = min(step, positions)
    return Sizes(
        context_length=context_length,
        positions=positions,
        slots=slots,
        drafts=drafts,
        chunk=min(chunk, positions // PAGE_TOKENS * PAGE_TOKENS),
        step=step,
        # While it loads a model, the library writes a whole step into the cache.
        cache=max(texts, whole_pages(step)),
    )


def place(
    key: str,
    gigabytes: str | Sequence[float],
    *,
    reserve_gigabytes: float | None,
    free_bytes: Sequence[int],
) -> Placement:
    """Where a model goes.

    Args:
        key: that says so, for errors: `gpus` or `draft_gpus`.
        gigabytes: its value.
        reserve_gigabytes: to be kept free on each GPU.
        free_bytes: on each GPU that this process sees.

    Raises:
        InvalidConfig: no GPU is to be used, or one that is not there.
    """
    kept = int((reserve_gigabytes or 0.0) * _GIGABYTE)
    least = [max(kept, _LEAST_RESERVE_BYTES[min(index, 1)]) for index in range(len(free_bytes))]
    if isinstance(gigabytes, str):
        return Placement(reserve_bytes=tuple(least))
    check_gpus(key, gigabytes, seen=len(free_bytes), backend="exllamav2")
    sizes = [*gigabytes[: len(free_bytes)], *[0.0] * (len(free_bytes) - len(gigabytes))]
    return Placement(
        reserve_bytes=tuple(
            max(reserve, free - int(size * _GIGABYTE))
            for reserve, free, size in zip(least, free_bytes, sizes, strict=True)
        ),
        hidden=frozenset(index for index, size in enumerate(sizes) if not size),
    )


def split_by_hand(
    placement: Placement, free_bytes: Sequence[int], *, weight_bytes: int, cache_bytes: int
) -> list[float]:
    """Gibibytes of weights on each GPU, which leave room for the part of the cache that comes along."""
    share = weight_bytes / (weight_bytes + cache_bytes)
    return [
        0.0 if index in placement.hidden else max(0, free - reserve) * share / _GIBIBYTE
        for index, (free, reserve) in enumerate(zip(free_bytes, placement.reserve_bytes, strict=True))
    ]


def split_of_layers(placement: Placement, free_bytes: Sequence[int]) -> list[float]:
    """Gibibytes on each GPU, of everything, where every layer is split over all of them.

    Raises:
        InvalidConfig: that would be one GPU only.
    """
    split = split_by_hand(placement, free_bytes, weight_bytes=1, cache_bytes=0)
    if sum(map(bool, split)) <= 1:
        raise InvalidConfig(
            "`tp` splits each layer over several GPUs, but only one may be used. Leave it out."
        )
    return split
