from __future__ import annotations

import random
from typing import Any

import pytest

from gallama.config import ModelSpec
from gallama.engines.llama_cpp import _shelf_tokens
from gallama.engines.llama_cpp.bindings import KvCacheFull
from gallama.engines.llama_cpp.context import (
    IDLE_TOKENS_BESIDE_WORK,
    BatchPart,
    CachedSequence,
    SequenceCache,
    common_prefix,
)
from gallama.engines.llama_cpp.options import context_options, read_options
from tests.engines.llama_cpp.memory_kv import MemoryKv

PROMPT = list(range(100, 120))
OTHER = list(range(200, 220))
THIRD = list(range(300, 320))


def make(
    *,
    cells: int = 1000,
    sequences: int = 4,
    partly: bool = True,
    shares_cells: bool = True,
    shelf_tokens: int = 0,
    has_window: bool = False,
) -> tuple[SequenceCache, MemoryKv]:
    kv = MemoryKv(cells, can_forget_partly=partly, shares_cells=shares_cells)
    cache = SequenceCache(
        kv,
        sequences=sequences,
        can_forget_partly=partly,
        has_window=has_window,
        shelf_tokens=shelf_tokens,
    )
    return cache, kv


def read(cache: SequenceCache, token_ids: list[int]) -> CachedSequence:
    """Acquire a sequence and compute what of the tokens is not in the cache."""
    sequence = cache.acquire(token_ids)
    append(cache, sequence, token_ids[len(sequence.token_ids) :])
    return sequence


def append(cache: SequenceCache, sequence: CachedSequence, token_ids: list[int]) -> list[float]:
    part = BatchPart(sequence, token_ids, logits=1)
    cache.decode([part])
    ((logits,),) = cache.logits([part])
    return [float(value) for value in logits]


def read_and_leave(cache: SequenceCache, token_ids: list[int]) -> CachedSequence:
    sequence = read(cache, token_ids)
    cache.release(sequence)
    return sequence


def test_the_longest_prefix_that_any_sequence_holds_is_reused() -> None:
    cache, _ = make()
    read_and_leave(cache, PROMPT[:8])
    read_and_leave(cache, [*PROMPT[:12], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    read_and_leave(cache, OTHER)
    assert cache.shared_tokens(PROMPT) == 12
    assert cache.acquire(PROMPT).token_ids == PROMPT[:12]


def test_at_least_the_last_token_is_left_to_compute() -> None:
    cache, _ = make()
    read_and_leave(cache, [*PROMPT, 1, 2])
    assert cache.acquire(PROMPT).token_ids == PROMPT[:-1]


def test_the_end_of_a_sequence_can_be_taken_back() -> None:
    cache, kv = make()
    sequence = read(cache, PROMPT)
    cache.shorten(sequence, 8)
    append(cache, sequence, [1, 2])
    cache.shorten(sequence, 50)
    assert kv.tokens(sequence.id) == sequence.token_ids == [*PROMPT[:8], 1, 2]


def test_a_prefix_of_a_few_tokens_is_not_worth_a_sequence() -> None:
    cache, _ = make()
    read_and_leave(cache, PROMPT)
    assert cache.acquire([*PROMPT[:3], 1, 2, 3]).token_ids == []


def test_without_reuse_a_sequence_is_empty() -> None:
    cache, kv = make()
    read_and_leave(cache, PROMPT)
    sequence = cache.acquire(PROMPT, reuse=False)
    assert sequence.token_ids == kv.tokens(sequence.id) == []


def test_what_goes_on_from_an_idle_sequence_takes_it_over() -> None:
    cache, kv = make()
    first = read_and_leave(cache, PROMPT)
    second = read(cache, [*PROMPT, 1, 2])
    assert second is first
    assert kv.computed_tokens == len(PROMPT) + 2
    assert kv.tokens(second.id) == second.token_ids == [*PROMPT, 1, 2]


def test_what_shares_little_of_an_idle_sequence_copies_it() -> None:
    cache, kv = make()
    first = read_and_leave(cache, PROMPT)
    second = read(cache, [*PROMPT[:5], 1, 2])
    assert second is not first
    assert kv.tokens(first.id) == PROMPT
    assert kv.used_cells == len(PROMPT) + 2, "a copy shares its cells"


def test_a_busy_sequence_is_copied_never_taken_over() -> None:
    cache, kv = make()
    busy = read(cache, PROMPT)
    second = read(cache, [*PROMPT, 1])
    assert second is not busy
    assert kv.tokens(busy.id) == busy.token_ids == PROMPT
    assert kv.computed_tokens == len(PROMPT) + 1


def test_the_logits_are_those_after_all_tokens_of_the_sequence() -> None:
    cache, _ = make()
    read_and_leave(cache, [*PROMPT[:10], 7, 7])
    sequence = cache.acquire(PROMPT)
    assert append(cache, sequence, PROMPT[10:]) == PROMPT


def test_a_batch_appends_to_many_sequences() -> None:
    cache, kv = make()
    one, other = cache.acquire(PROMPT), cache.acquire(OTHER)
    parts = [BatchPart(one, PROMPT[:3], logits=0), BatchPart(other, OTHER, logits=2)]
    cache.decode(parts)
    nothing, rows = cache.logits(parts)
    assert nothing == []
    assert [row.tolist() for row in rows] == [OTHER[:-1], OTHER]
    assert kv.tokens(one.id) == PROMPT[:3]


def test_the_least_recently_used_idle_sequence_makes_room() -> None:
    cache, kv = make(cells=60)
    oldest = read_and_leave(cache, PROMPT)
    newer = read_and_leave(cache, OTHER)
    third = read_and_leave(cache, THIRD)
    read_and_leave(cache, [*PROMPT, 1])  # used again, so that the one after it is the oldest now
    assert kv.tokens(oldest.id) == [*PROMPT, 1]
    assert kv.tokens(newer.id) == []
    assert kv.tokens(third.id) == THIRD


def test_busy_sequences_are_never_evicted() -> None:
    cache, kv = make(cells=45)
    one, other = read(cache, PROMPT), read(cache, OTHER)
    with pytest.raises(KvCacheFull):
        append(cache, one, [1] * 6)
    assert kv.tokens(one.id) == one.token_ids == PROMPT
    assert kv.tokens(other.id) == other.token_ids == OTHER


def test_a_discarded_sequence_gives_its_room_back() -> None:
    cache, kv = make(cells=45)
    one, other = read(cache, PROMPT), read(cache, OTHER)
    cache.discard(other)
    append(cache, one, [1] * 6)
    assert kv.tokens(one.id) == [*PROMPT, *[1] * 6]
    assert other.token_ids == []


def test_discarding_all_leaves_an_empty_idle_cache() -> None:
    cache, kv = make(sequences=1)
    read(cache, PROMPT)
    cache.discard_all()
    assert cache.cached_tokens == kv.used_cells == 0
    assert read(cache, OTHER).token_ids == OTHER


def test_a_model_that_cannot_forget_partly_goes_on_only_from_whole_idle_sequences() -> None:
    cache, _ = make(partly=False)
    first = read_and_leave(cache, PROMPT)
    assert cache.acquire(PROMPT).token_ids == [], "the last token would have to be forgotten"
    assert cache.acquire([*PROMPT[:10], 1]).token_ids == []
    assert cache.acquire([*PROMPT, 1]) is first
    assert cache.acquire([*PROMPT, 1]).token_ids == [], "it is busy now, and cannot be copied in part"


def test_idle_sequences_leave_the_cache_before_they_slow_down_those_at_work() -> None:
    long = list(range(1000, 1000 + IDLE_TOKENS_BESIDE_WORK))
    cache, kv = make(cells=5000, shelf_tokens=5000)
    read_and_leave(cache, long)
    read_and_leave(cache, OTHER)
    assert kv.used_cells == len(long) + len(OTHER), "nobody is at work, whom they could slow down"
    read(cache, THIRD)
    assert kv.used_cells == len(OTHER) + len(THIRD)
    assert cache.shelved_tokens == len(long)
    assert read(cache, [*long, 1]).token_ids == [*long, 1]
    assert kv.computed_tokens == len(long) + len(OTHER) + len(THIRD) + 1


def test_an_idle_sequence_that_shares_its_cells_with_one_at_work_stays() -> None:
    long = list(range(1000, 1000 + 2 * IDLE_TOKENS_BESIDE_WORK))
    cache, kv = make(cells=5000, shelf_tokens=5000)
    busy = read(cache, long)
    cache.release(cache.fork(busy, len(long)))
    assert kv.restored_tokens == cache.shelved_tokens == 0
    assert cache.cached_tokens == 2 * len(long)


def test_what_makes_room_goes_on_the_shelf_and_comes_back() -> None:
    cache, kv = make(cells=45, shelf_tokens=100)
    for prompt in (PROMPT, OTHER, THIRD):
        read_and_leave(cache, prompt)
    assert cache.shelved_tokens == 20
    sequence = read(cache, [*PROMPT, 1])
    assert kv.tokens(sequence.id) == [*PROMPT, 1]
    assert kv.restored_tokens == 20
    assert kv.computed_tokens == 61


def test_the_shelf_drops_what_was_not_used_for_longest() -> None:
    cache, kv = make(cells=20, sequences=1, shelf_tokens=45)
    for prompt in (PROMPT, OTHER, PROMPT, THIRD, PROMPT):
        read_and_leave(cache, prompt)
    assert cache.shelved_tokens <= 45
    assert cache.shared_tokens([*THIRD, 1]) == 20
    assert cache.shared_tokens([*OTHER, 1]) == 0
    assert kv.tokens(0) == PROMPT


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({"cache_size": 4096, "max_concurrent_requests": 16}, 4096),
        ({"cache_size": 8192, "max_concurrent_requests": 8}, 2048),
        ({"cache_size": 16384, "max_concurrent_requests": 16}, 4096),
        ({"cache_size": 4096, "max_concurrent_requests": 4}, 2048),
        ({"cache_size": 1024, "max_concurrent_requests": 1}, 1024),
        ({"cache_size": 8192, "max_concurrent_requests": 8, "backend_extra_args": {"shelf_tokens": 7}}, 7),
    ],
    ids=["shared", "two texts are a quarter", "a quarter", "two texts", "one text", "as it is told"],
)
def test_the_shelf_is_as_large_as_documented(keys: dict[str, Any], tokens: int) -> None:
    spec = ModelSpec(model_id="any", max_seq_len=1024, **keys)
    options = read_options(spec)
    assert _shelf_tokens(options, context_options(spec, options, 1024)) == tokens


def test_a_longer_turn_takes_its_beginnings_place_on_the_shelf() -> None:
    cache, _ = make(cells=45, sequences=1, shelf_tokens=100)
    for prompt in (PROMPT, OTHER, [*PROMPT, *OTHER], THIRD):
        read_and_leave(cache, prompt)
    assert cache.shelved_tokens == len(OTHER) + len([*PROMPT, *OTHER])
    assert cache.shared_tokens([*PROMPT, 1]) == len(PROMPT)


def test_a_snapshot_of_little_use_is_not_copied() -> None:
    cache, _ = make(cells=300, sequences=1, shelf_tokens=1000)
    read_and_leave(cache, [*PROMPT[:10], *range(1000, 1200)])
    read_and_leave(cache, OTHER)
    assert cache.shared_tokens(PROMPT) == 0


def test_a_snapshot_that_does_not_fit_beside_others_is_left_out() -> None:
    cache, kv = make(cells=45, sequences=3, shelf_tokens=100)
    read_and_leave(cache, PROMPT)
    one, other = read(cache, OTHER), read(cache, THIRD)
    assert cache.acquire([*PROMPT, 1]).token_ids == []
    assert kv.tokens(one.id) == OTHER
    assert kv.tokens(other.id) == THIRD


def test_a_fork_holds_all_that_its_source_has_read() -> None:
    for shares_cells in (True, False):
        cache, kv = make(shares_cells=shares_cells)
        source = read(cache, [*PROMPT, 1, 2])
        fork = cache.fork(source, len(PROMPT))
        assert kv.tokens(fork.id) == fork.token_ids == PROMPT
        assert kv.computed_tokens == len(PROMPT) + 2


def test_a_prefix_goes_from_one_part_of_the_cells_to_another() -> None:
    cache, kv = make(shares_cells=False, sequences=2)
    busy = read(cache, PROMPT)
    second = read(cache, [*PROMPT[:15], 1, 2])
    assert second is not busy
    assert kv.tokens(second.id) == [*PROMPT[:15], 1, 2]
    assert kv.computed_tokens == len(PROMPT) + 2


def test_work_goes_beside_work_where_each_sequence_has_its_own_cells() -> None:
    cache, _ = make(shares_cells=False, sequences=4)
    first = [read(cache, [number] * 20) for number in range(4)]
    for sequence in (first[0], first[1], first[3]):
        cache.release(sequence)
    assert cache.acquire(PROMPT).id in (1, 3)


def test_a_restored_sequence_of_a_model_with_a_window_is_never_shortened() -> None:
    cache, kv = make(cells=30, sequences=2, shelf_tokens=100, has_window=True)
    read_and_leave(cache, PROMPT)
    read_and_leave(cache, OTHER)
    assert cache.shared_tokens([*PROMPT[:12], 1]) == 0, "the snapshot may hold nothing of before"
    restored = read(cache, [*PROMPT, 1])
    assert kv.restored_tokens == len(PROMPT)
    assert cache.shared_tokens([*PROMPT[:12], 1]) == 0
    assert cache.shared_tokens([*PROMPT, 1, 2]) == len(PROMPT) + 1
    assert restored.least_tokens == len(PROMPT)


def test_common_prefix_is_where_two_sequences_begin_to_differ() -> None:
    rng = random.Random(0)
    for _ in range(300):
        shared = [rng.randrange(3) for _ in range(rng.randrange(6))]
        one = [*shared, *(rng.randrange(3) for _ in range(rng.randrange(4)))]
        other = [*shared, *(rng.randrange(3) for _ in range(rng.randrange(4)))]
        expected = next(
            (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
            min(len(one), len(other)),
        )
        assert common_prefix(one, other) == expected, (one, other)


@pytest.mark.parametrize("shelf_tokens", [0, 60])
@pytest.mark.parametrize(
    ("partly", "shares_cells", "has_window"),
    [(True, True, False), (True, False, False), (True, True, True), (False, True, False)],
)
def test_whatever_happens_the_cache_knows_what_it_holds(
    partly: bool, shares_cells: bool, has_window: bool, shelf_tokens: int
) -> None:
    """Random requests start, grow and end in a cache that is too small for them."""
    rng = random.Random(1)
    for _ in range(40):
        cache, kv = make(
            cells=rng.choice([30, 60, 200]),
            sequences=rng.choice([3, 6]),
            partly=partly,
            shares_cells=shares_cells,
            has_window=has_window,
            shelf_tokens=shelf_tokens,
        )
        busy: list[CachedSequence] = []
        for _ in range(60):
            _change_something(cache, kv, busy, rng)
            assert cache.cached_tokens == kv.held_tokens
            for sequence in busy:
                assert sequence.is_busy
                assert kv.tokens(sequence.id) == sequence.token_ids


def _change_something(
    cache: SequenceCache, kv: MemoryKv, busy: list[CachedSequence], rng: random.Random
) -> None:
    action = rng.choice(["start", "start", "grow", "grow", "end", "discard"])
    if action == "start" and len(busy) < 3:
        prompt = [rng.randrange(2) for _ in range(rng.randrange(2, 25))]
        expected = cache.shared_tokens(prompt)
        sequence = cache.acquire(prompt)
        assert sequence not in busy
        # What was on the shelf may find no room.
        assert sequence.token_ids == prompt[:expected] or (cache.shelved_tokens and not sequence.token_ids)
        assert expected < len(prompt)
        busy.append(sequence)
    elif action == "grow" and busy:
        sequence = rng.choice(busy)
        before = {other.id: kv.tokens(other.id) for other in busy}
        token_ids = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
        try:
            assert append(cache, sequence, token_ids) == [*before[sequence.id], *token_ids]
        except KvCacheFull:
            assert all(kv.tokens(other.id) == before[other.id] for other in busy)
            assert kv.filled_sequences <= set(before) or not kv.shares_cells, "nobody idle is left"
    elif busy:
        sequence = busy.pop(rng.randrange(len(busy)))
        (cache.release if action == "end" else cache.discard)(sequence)
