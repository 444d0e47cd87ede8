"""No control token comes about in a segment with a character that the client wrote."""

from __future__ import annotations

import random
import time

import pytest

from gallama.dialects.guard import choose_sentinel, cut_at, guarded, make_guard
from gallama.errors import InvalidRequest

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "[INST]", "[/INST]", "<<x>>")
FIXED_TEXTS = ("", "\n", "<", "</", "<|", "|>", ">", "[", "]", "user\n", "[INST]", "<|im_end|>")
SENTINEL = "\ufdd0"


def holds_forged_token(parts: list[tuple[str, bool]]) -> bool:
    """Whether a token's name stands in one segment, with a character of a part that is a client's."""
    guard = make_guard(CONTROL_TOKENS, SENTINEL)
    clients = [is_clients for text, is_clients in parts for _ in text]
    start = 0
    for segment in cut_at(SENTINEL, "".join(guard(text) if mine else text for text, mine in parts)):
        for token in CONTROL_TOKENS:
            places = [i for i in range(len(segment)) if segment.startswith(token, i)]
            if any(any(clients[start + i : start + i + len(token)]) for i in places):
                return True
        start += len(segment)
    assert start == len(clients)
    return False


def test_no_pieces_of_control_tokens_add_up_to_one() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        parts = []
        for _ in range(rng.randint(1, 4)):
            token = rng.choice(CONTROL_TOKENS)
            first, last = rng.choice((0, 1, 2, len(token) // 2)), rng.choice((0, 1, 2))
            words = rng.choice(("", " ", "x", "<", token)) + token[first : len(token) - last]
            parts += [(rng.choice(FIXED_TEXTS), False), (words, True)]
        assert not holds_forged_token([*parts, (rng.choice(FIXED_TEXTS), False)]), parts


@pytest.mark.parametrize(
    ("before", "words", "after"),
    [
        ("", "<|im_end|>", ""),
        ("", "<|im_", "end|>"),
        ("<|im", "_end|>", ""),
        ("<", "tool_call", ">"),
        ("</", " tool_call ".strip(), ">"),
        ("", "<<|im_end|>", ""),
        ("", "<<<x>>>", ""),
    ],
)
def test_client_cannot_complete_a_control_token(before: str, words: str, after: str) -> None:
    assert not holds_forged_token([(before, False), (words, True), (after, False)])


def test_two_of_a_clients_texts_cannot_complete_each_other() -> None:
    assert not holds_forged_token([("<|im_", True), ("end|>", True)])


@pytest.mark.parametrize("text", ["", " ", "plain text", "a < b", "object", "x = y[0]", "[1]"])
def test_ordinary_text_is_not_cut(text: str) -> None:
    assert make_guard(CONTROL_TOKENS, SENTINEL)(text) == text


def test_texts_are_cut_at_any_depth_keys_too() -> None:
    guard = make_guard(CONTROL_TOKENS, "|")

    assert guarded({"[INST]": ["[INST]", 1, None]}, guard) == {"[|INST]": ["[|INST]", 1, None]}


def test_sentinel_is_a_character_that_nobody_uses() -> None:
    assert choose_sentinel("\ufdd0 and \\uFDD1") == "\ufdd2"


def test_request_with_all_sentinels_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"U\+FDD0"):
        choose_sentinel("".join(map(chr, range(0xFDD0, 0xFDF0))))


@pytest.mark.parametrize("unit", ["<", "<|im_en", "<|im_end|>", "a"])
def test_long_texts_with_many_control_tokens_are_guarded_soon(unit: str) -> None:
    guard = make_guard([f"<|reserved_{n}|>" for n in range(1000)] + list(CONTROL_TOKENS), SENTINEL)
    text = unit * (500_000 // len(unit))

    started = time.process_time()
    guard(text)
    assert time.process_time() - started < 5
