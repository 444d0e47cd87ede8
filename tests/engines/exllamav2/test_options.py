from __future__ import annotations

from typing import Any

import pytest

from gallama.config import ModelSpec
from gallama.engines.exllamav2.options import (
    Rotations,
    Sizes,
    choose_sizes,
    place,
    read_options,
    split_by_hand,
    split_of_layers,
)
from gallama.errors import InvalidConfig

GIB = 2**30
PLAIN = Rotations(trained_length=8192)
LONG = Rotations(trained_length=131_072, short_length=4096)


def spec(**values: Any) -> ModelSpec:
    return ModelSpec.model_validate({"model_id": "m", "backend": "exllamav2", **values})


def sizes_of(rotations: Rotations, *, paged: bool = True, **values: Any) -> Sizes:
    asked = spec(**values)
    return choose_sizes(asked, read_options(asked), rotations, paged=paged)


def test_an_unknown_argument_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidConfig, match=r"backend_extra_args\.n_ctx.*max_chunk_size"):
        read_options(spec(backend_extra_args={"n_ctx": 5}))


def test_a_chunk_is_of_whole_pages() -> None:
    assert read_options(spec(backend_extra_args={"max_chunk_size": 512})).max_chunk_size == 512
    with pytest.raises(InvalidConfig, match="multiple of 256"):
        read_options(spec(backend_extra_args={"max_chunk_size": 500}))


def test_the_longest_text_is_what_the_spec_says_else_what_model_and_cache_have() -> None:
    def length(**values: Any) -> int:
        return sizes_of(PLAIN, **values).context_length

    assert length() == 8192
    assert length(cache_size=4096) == 4096
    assert length(cache_size=32768) == 8192
    assert length(max_seq_len=1000, cache_size=4096) == 1000


def test_more_positions_than_the_model_has_must_be_stretched() -> None:
    with pytest.raises(InvalidConfig, match=r"has 8192 positions.*rope_alpha"):
        sizes_of(PLAIN, max_seq_len=16384)
    stretched = sizes_of(PLAIN, max_seq_len=16384, backend_extra_args={"rope_alpha": 2.5})
    assert stretched.context_length == 16384


def test_cache_and_positions_have_room_for_the_drafts_behind_the_longest_text() -> None:
    drafting: dict[str, Any] = {"speculative": "ngram", "num_draft_tokens": 30}
    for cache_size, more in ((4096, {}), (4096, drafting), (65536, {})):
        sizes = sizes_of(PLAIN, max_seq_len=4096, cache_size=cache_size, **more)
        assert sizes.cache % 256 == 0
        assert sizes.cache >= cache_size + sizes.drafts
        assert sizes.positions >= sizes.context_length + sizes.drafts


def test_a_step_has_room_for_a_draft_of_each_text() -> None:
    for slots in (1, 16, 300, 1024):
        sizes = sizes_of(PLAIN, max_concurrent_requests=slots)
        assert sizes.drafts >= 1
        assert sizes.step >= slots * (1 + sizes.drafts)
        assert sizes.chunk <= sizes.step <= sizes.positions


def test_drafts_that_no_step_has_room_for_are_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"max_concurrent_requests.*num_draft_tokens.*max_chunk_size"):
        sizes_of(PLAIN, max_concurrent_requests=200, speculative="ngram", num_draft_tokens=15)


def test_without_pages_there_is_one_slot() -> None:
    assert sizes_of(PLAIN, paged=False).slots == 1


def test_buffers_do_not_make_a_longrope_model_take_its_long_factors() -> None:
    for length in (100, 2000, 4096 - 8):
        sizes = sizes_of(LONG, max_seq_len=length)
        assert length + sizes.drafts <= sizes.positions <= 4096
        assert sizes.chunk <= sizes.step <= sizes.positions


def test_long_texts_of_a_longrope_model_are_scaled_as_the_longest_that_it_knows() -> None:
    for length in (5000, 9000, 131_072 - 8):
        assert sizes_of(LONG, max_seq_len=length).positions == 131_072


def test_a_whole_step_finds_room_in_the_cache_however_small_it_is() -> None:
    for context_length, slots in ((300, 16), (300, 200), (8192, 16)):
        sizes = sizes_of(PLAIN, max_seq_len=context_length, max_concurrent_requests=slots)
        assert sizes.cache % 256 == 0
        assert sizes.cache >= sizes.step >= sizes.chunk >= 256
        assert sizes.positions >= sizes.step


def test_a_text_that_only_drafts_would_make_too_long_for_short_factors_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="4088 at most, or to more than 4096"):
        sizes_of(LONG, max_seq_len=4096)
    sizes = sizes_of(LONG, cache_size=4096)
    assert sizes.context_length == 4088


def test_a_yarn_model_keeps_its_own_length_for_its_rotations() -> None:
    yarn = Rotations(trained_length=131_072, is_yarn=True)
    assert sizes_of(yarn, max_seq_len=1000).positions == 131_072


def test_gigabytes_leave_the_rest_of_a_gpu_free() -> None:
    placement = place("gpus", (10, 4), reserve_gigabytes=None, free_bytes=[24 * 10**9, 20 * 10**9])
    assert placement.reserve_bytes == (14 * 10**9, 16 * 10**9)
    assert not placement.has_gap


def test_what_is_to_be_kept_free_is_kept_free_whatever_the_gigabytes() -> None:
    free = [24 * 10**9] * 2
    assert place("gpus", "auto", reserve_gigabytes=2, free_bytes=free).reserve_bytes == (2 * 10**9,) * 2
    assert place("gpus", (23, 30), reserve_gigabytes=2, free_bytes=free).reserve_bytes == (2 * 10**9,) * 2


def test_auto_leaves_what_the_library_leaves() -> None:
    placement = place("gpus", "auto", reserve_gigabytes=None, free_bytes=[24 * 10**9] * 3)
    assert placement.reserve_bytes == (192 * 2**20, 64 * 2**20, 64 * 2**20)


def test_a_gpu_of_zero_gigabytes_is_hidden() -> None:
    free = [24 * 10**9] * 3
    behind = place("gpus", (10, 0), reserve_gigabytes=None, free_bytes=free)
    assert behind.hidden == {1, 2}
    assert not behind.has_gap
    before = place("draft_gpus", (0, 4), reserve_gigabytes=None, free_bytes=free)
    assert before.hidden == {0, 2}
    assert before.has_gap


def test_gpus_that_are_not_there_or_none_at_all_are_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"`draft_gpus` asks for 4 GB on GPU 1, but this process sees 1"):
        place("draft_gpus", (0, 4), reserve_gigabytes=None, free_bytes=[10**9])
    with pytest.raises(InvalidConfig, match="`gpus` hides every GPU"):
        place("gpus", (0, 0), reserve_gigabytes=None, free_bytes=[10**9])


def test_a_split_by_hand_counts_weights_in_gibibytes_and_leaves_room_for_the_cache() -> None:
    free = [24 * GIB] * 3
    placement = place("gpus", (0, 8 * GIB / 1e9, 4 * GIB / 1e9), reserve_gigabytes=None, free_bytes=free)
    split = split_by_hand(placement, free, weight_bytes=3 * GIB, cache_bytes=GIB)
    assert split == pytest.approx([0, 6, 3], abs=1e-6)


def test_layers_are_split_over_two_gpus_or_more() -> None:
    free = [24 * 10**9] * 2
    both = place("gpus", (10, 5), reserve_gigabytes=None, free_bytes=free)
    assert split_of_layers(both, free) == pytest.approx([10e9 / GIB, 5e9 / GIB])
    one = place("gpus", (10, 0), reserve_gigabytes=None, free_bytes=free)
    with pytest.raises(InvalidConfig, match="`tp` splits each layer over several GPUs, but only one"):
        split_of_layers(one, free)
