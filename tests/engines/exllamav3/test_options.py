"""From a spec to what exllamav3 takes; nothing here imports it."""

from __future__ import annotations

from typing import Any

import pytest

from gallama.config import ModelSpec
from gallama.engines.exllamav3.options import (
    CacheOptions,
    cache_options,
    choose_context_length,
    draft_cache_options,
    placement,
    read_options,
    widest_draft,
)
from gallama.errors import InvalidConfig, NotEnoughMemory

GIB = 2**30


def spec_with(**values: Any) -> ModelSpec:
    return ModelSpec.model_validate({"model_id": "/models/x", "backend": "exllamav3", **values})


def test_a_key_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(InvalidConfig, match=r"backend_extra_args\.chunk_size.*takes: max_chunk_size"):
        read_options(spec_with(backend_extra_args={"chunk_size": 512}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_chunk_size": 300}, "max_chunk_size"),
        ({"max_chunk_size": 0}, "max_chunk_size"),
        ({"prompt_step_ms": 0}, "prompt_step_ms"),
        ({"cache_bits": "9,4"}, "cache_bits"),
        ({"cache_bits": [4]}, "cache_bits"),
        ({"tp_backend": "nccl"}, "tp_backend.*only"),
        ({"ngram_match_min": 2}, "ngram_match_min.*only"),
    ],
)
def test_a_value_that_cannot_be_or_would_not_be_used_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        read_options(spec_with(backend_extra_args=values))


def test_bits_of_the_cache_are_read_from_text_and_from_a_list() -> None:
    for written in ("6,5", [6, 5]):
        assert read_options(spec_with(backend_extra_args={"cache_bits": written})).cache_bits == (6, 5)


def test_two_keys_for_the_cache_s_bits_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="cache_quant"):
        read_options(spec_with(cache_quant="Q8", backend_extra_args={"cache_bits": "8,8"}))


@pytest.mark.parametrize(("quant", "bits"), [(None, None), ("FP16", None), ("Q8", (8, 8)), ("Q4", (4, 4))])
def test_cache_quant_is_bits_of_keys_and_values(quant: str | None, bits: tuple[int, int] | None) -> None:
    spec = spec_with(cache_quant=quant)
    made = cache_options(spec, read_options(spec), context_length=1024, widest_draft=15)
    assert made.bits == bits


@pytest.mark.parametrize("widest", [0, 15, 63])
@pytest.mark.parametrize(("cache_size", "context_length"), [(None, 1000), (4096, 1000), (1024, 1024)])
def test_a_cache_holds_its_texts_and_what_is_guessed_behind_them(
    cache_size: int | None, context_length: int, widest: int
) -> None:
    spec = spec_with(cache_size=cache_size)
    made = cache_options(spec, read_options(spec), context_length=context_length, widest_draft=widest)
    wanted = max(cache_size or 0, context_length) + 1 + widest
    assert made.tokens % 256 == 0
    assert wanted <= made.tokens < wanted + 256


def test_the_context_is_as_long_as_asked_for_else_as_model_and_cache_allow() -> None:
    assert choose_context_length(spec_with(max_seq_len=500), 8192) == 500
    assert choose_context_length(spec_with(cache_size=2048), 8192) == 2048
    assert choose_context_length(spec_with(cache_size=65536), 8192) == 8192
    assert choose_context_length(spec_with(), 8192) == 8192


def test_a_context_beyond_the_model_s_positions_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="8192 positions"):
        choose_context_length(spec_with(max_seq_len=8193), 8192)


def test_a_draft_model_s_cache_is_as_large_as_the_model_s() -> None:
    target = CacheOptions(4352, (8, 8))
    spec = spec_with(draft_model_id="/models/y", cache_size=4096)
    assert draft_cache_options(spec, target, context_length=1024) == target
    same = spec.model_copy(update={"draft_cache_size": 4000, "draft_cache_quant": "FP16"})
    assert draft_cache_options(same, target, context_length=1024) == CacheOptions(4352, None)
    other = spec.model_copy(update={"draft_cache_size": 2048})
    with pytest.raises(InvalidConfig, match="draft_cache_size"):
        draft_cache_options(other, target, context_length=1024)


def test_a_recurrent_model_has_no_room_for_forced_runs_alone() -> None:
    drafting = spec_with(draft_model_id="/models/y", num_draft_tokens=5)
    assert widest_draft(spec_with(), is_recurrent=True) == 0
    assert widest_draft(drafting, is_recurrent=True) == 5
    assert widest_draft(spec_with(), is_recurrent=False) == 15
    wide = spec_with(draft_model_id="/models/y", num_draft_tokens=31)
    assert widest_draft(wide, is_recurrent=False) == 31


def test_gigabytes_become_the_library_s_gibibytes() -> None:
    where = placement("gpus", (24.0, 0.0, 10.0), reserve_gigabytes=None, free_bytes=[80 * GIB] * 3)
    assert where == {"use_per_device": [24e9 / GIB, 0.0, 10e9 / GIB]}


def test_without_gigabytes_all_gpus_are_filled_but_for_a_reserve() -> None:
    free = [80 * GIB] * 2
    assert placement("gpus", "auto", reserve_gigabytes=None, free_bytes=free) == {
        "reserve_per_device": [0.5, 0.5]
    }
    assert placement("gpus", "auto", reserve_gigabytes=3.0, free_bytes=free) == {
        "reserve_per_device": [3e9 / GIB] * 2
    }


def test_a_reserve_is_kept_from_the_gigabytes_that_are_free() -> None:
    free = [int(20e9), int(20e9)]
    where = placement("gpus", (24.0, 10.0), reserve_gigabytes=2.0, free_bytes=free)
    assert where["use_per_device"] == pytest.approx([18e9 / GIB, 10e9 / GIB])


def test_what_the_draft_model_takes_is_no_longer_the_model_s() -> None:
    where = placement("gpus", (24.0,), reserve_gigabytes=None, free_bytes=[80 * GIB], taken_bytes=[int(4e9)])
    assert where["use_per_device"] == pytest.approx([20e9 / GIB])


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidConfig, match=r"`draft_gpus`.*GPU 1"):
        placement("draft_gpus", (0.0, 8.0), reserve_gigabytes=None, free_bytes=[80 * GIB])


def test_more_gpus_than_there_are_may_be_hidden() -> None:
    where = placement("gpus", (8.0, 0.0, 0.0), reserve_gigabytes=None, free_bytes=[80 * GIB])
    assert where["use_per_device"] == pytest.approx([8e9 / GIB])


def test_no_gpu_at_all_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="hides every GPU"):
        placement("gpus", (0.0,), reserve_gigabytes=None, free_bytes=[80 * GIB])


def test_a_gpu_of_which_nothing_is_left_is_named() -> None:
    with pytest.raises(NotEnoughMemory, match="GPU 0"):
        placement("gpus", (8.0,), reserve_gigabytes=3.0, free_bytes=[int(2e9)])
