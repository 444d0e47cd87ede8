"""What a spec says of paged caches and of GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from gallama.config import ModelSpec
from gallama.engines.generators.settings import PAGE_TOKENS, check_draft_cache, check_gpus, whole_pages
from gallama.errors import InvalidConfig


def drafting(**settings: Any) -> ModelSpec:
    return ModelSpec.model_validate(
        {"model_id": "m", "backend": "exllamav2", "draft_model_id": "d", "cache_size": 8192, **settings}
    )


def test_a_page_that_is_begun_is_a_whole_one() -> None:
    assert [whole_pages(tokens) for tokens in (0, 1, PAGE_TOKENS, PAGE_TOKENS + 1)] == [
        0,
        PAGE_TOKENS,
        PAGE_TOKENS,
        2 * PAGE_TOKENS,
    ]


def test_the_draft_models_cache_is_as_large_as_the_models() -> None:
    check_draft_cache(drafting(), context_length=4096, backend="exllamav2")
    check_draft_cache(drafting(draft_cache_size=8192), context_length=4096, backend="exllamav2")
    check_draft_cache(drafting(draft_cache_size=16384), context_length=16384, backend="exllamav2")
    with pytest.raises(InvalidConfig, match=r"`draft_cache_size` is 4096; with exllamav2.*8192"):
        check_draft_cache(drafting(draft_cache_size=4096), context_length=4096, backend="exllamav2")


def test_gpus_are_refused_that_are_hidden_or_not_there() -> None:
    check_gpus("gpus", (0, 4, 0), seen=2, backend="exllamav3")
    with pytest.raises(InvalidConfig, match=r"`gpus` hides every GPU, but exllamav3"):
        check_gpus("gpus", (0, 0), seen=2, backend="exllamav3")
    with pytest.raises(InvalidConfig, match=r"`draft_gpus` asks for 4 GB on GPU 2.* sees 2 of them"):
        check_gpus("draft_gpus", (1, 0, 4), seen=2, backend="exllamav3")
