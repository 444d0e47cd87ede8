"""What a spec says of paged caches and of GPUs, where each library of this kind is told the same."""

from __future__ import annotations

from collections.abc import Sequence

from gallama.config import ModelSpec
from gallama.config.model_spec import CACHE_PAGE_TOKENS
from gallama.errors import InvalidConfig

PAGE_TOKENS = CACHE_PAGE_TOKENS
"""The libraries' pages are of the size that our caches are rounded up to."""


def whole_pages(tokens: int) -> int:
    """So many tokens, rounded up to whole pages."""
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS


def check_draft_cache(spec: ModelSpec, *, context_length: int, backend: str) -> None:
    """A draft model's cache has the pages of the model's.

    Raises:
        InvalidConfig: it is to have another size.
    """
    asked, texts = spec.draft_cache_size, max(spec.cache_size or 0, context_length)
    if asked is not None and whole_pages(asked) != whole_pages(texts):
        raise InvalidConfig(
            f"`draft_cache_size` is {asked}; with {backend} the draft model's cache has as many tokens as the"
            f" model's ({texts}). Leave it out."
        )


def check_gpus(key: str, gigabytes: Sequence[float], *, seen: int, backend: str) -> None:
    """
    Args:
        key: `gpus` or `draft_gpus`.
        gigabytes: its value.
        seen: GPUs that this process sees.

    Raises:
        InvalidConfig: no GPU is to be used, or one that is not there.
    """
    if not any(gigabytes):
        raise InvalidConfig(f"`{key}` hides every GPU, but {backend} computes on GPUs only.")
    for index, size in enumerate(gigabytes):
        if size and index >= seen:
            raise InvalidConfig(
                f"`{key}` asks for {size:g} GB on GPU {index}, but this process sees {seen} of them, counted"
                " from 0."
            )
