"""Which tokens are checked ahead in a step."""

from __future__ import annotations

import random

from gallama.engines.exllamav3.drafts import Draft, common_prefix, lay_out


def test_nothing_to_check_is_no_rectangle() -> None:
    assert lay_out([Draft([]), Draft([])], width=0, most=15) == []
    assert lay_out([], width=0, most=15) == []


def test_a_run_of_one_text_is_laid_out_whole() -> None:
    assert lay_out([Draft([5, 6, 7], are_forced=True)], width=0, most=15) == [[5, 6, 7]]


def test_what_is_missing_to_a_width_is_filled() -> None:
    assert lay_out([Draft([5, 6, 7, 8, 9])], width=0, most=15) == [[5, 6, 7, 8, 9, 9, 9]]


def test_a_run_is_cut_at_the_widest_step() -> None:
    assert lay_out([Draft(range(40), are_forced=True)], width=0, most=15) == [list(range(15))]


def test_one_text_s_run_widens_no_step_in_which_it_costs_others_more() -> None:
    others = [Draft([])] * 7
    assert lay_out([Draft([5, 6, 7], are_forced=True), *others], width=0, most=15) == []
    rows = lay_out([Draft(range(7), are_forced=True), *others[:6]], width=0, most=15)
    assert [len(row) for row in rows] == [7] * 7


def test_the_guesses_of_a_draft_model_stay_as_wide_as_they_are() -> None:
    guesses = [Draft([1, 2, 3, 4]), Draft([5, 6, 7, 8])]
    assert lay_out(guesses, width=4, most=15) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_run_shorter_than_the_guesses_takes_their_place() -> None:
    rows = lay_out([Draft([1, 2], are_forced=True), Draft([5, 6, 7, 8])], width=4, most=15)
    assert rows == [[1, 2, 2, 2], [5, 6, 7, 8]]


def test_a_long_run_widens_a_step_of_guesses() -> None:
    rows = lay_out([Draft(range(15), are_forced=True), Draft([5, 6, 7, 8])], width=4, most=15)
    assert rows == [list(range(15)), [5, 6, 7, 8, *[8] * 11]]


def test_a_rectangle_begins_with_the_drafts_and_is_never_too_wide() -> None:
    rng = random.Random(0)
    for _ in range(500):
        width, texts = rng.randint(0, 8), rng.randint(1, 12)
        most = width + rng.randint(0, 60)
        lengths = [rng.choice([width, rng.randint(0, 80)]) for _ in range(texts)]
        drafts = [Draft([rng.randrange(9) for _ in range(length)]) for length in lengths]
        rows = lay_out(drafts, width=width, most=most)
        widths = {len(row) for row in rows}
        assert len(widths) <= 1
        assert not rows or width <= widths.pop() <= most
        for draft, row in zip(drafts, rows, strict=bool(rows)):
            common = min(len(draft.token_ids), len(row))
            assert row[:common] == list(draft.token_ids[:common])


def test_a_common_prefix_ends_where_tokens_differ_or_one_ends() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
