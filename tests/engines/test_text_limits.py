"""Limits of texts before they are cut up into tokens."""

from __future__ import annotations

import random

import pytest

from gallama.engines.text_limits import check_characters, reading_parts
from gallama.errors import TextTooLong


def test_texts_are_cut_up_in_parts_that_are_small_in_number_and_in_length() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.choice([1, 1000, 2**18, 2**21]) for _ in range(rng.randint(0, 200))]
        parts = reading_parts(lengths)
        assert [index for part in parts for index in part] == list(range(len(lengths)))
        assert all(1 <= len(part) <= 64 for part in parts)
        assert all(len(part) == 1 or sum(lengths[index] for index in part) <= 2**20 for part in parts)


def test_a_text_with_a_thousand_characters_for_each_token_is_refused_beyond_that() -> None:
    check_characters(5000, "input[2]", context_length=5, param="input")
    with pytest.raises(TextTooLong, match=r"`input\[2\]` has 5001 characters; the model takes 5 tokens"):
        check_characters(5001, "input[2]", context_length=5, param="input")
