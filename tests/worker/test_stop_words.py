from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from gallama.worker.stop_words import StopWords


def let_through(pieces: Sequence[str], words: Sequence[str], *, keep_word: bool = False) -> tuple[str, bool]:
    """The text that gets through, and whether a word was found."""
    stop_words = StopWords(words, keep_word=keep_word)
    text = "".join(stop_words.feed(piece) for piece in pieces)
    return text + stop_words.finish(), stop_words.found


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(len(text) + 1), k=rng.randint(0, min(6, len(text)))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def test_text_ends_before_the_first_word() -> None:
    assert let_through(["one END two END"], ["END"]) == ("one ", True)


def test_the_word_is_kept_on_demand() -> None:
    assert let_through(["one END two"], ["END"], keep_word=True) == ("one END", True)


def test_text_without_a_word_gets_through_whole() -> None:
    assert let_through(["on", "e E", "N"], ["END"]) == ("one EN", False)
    assert let_through(["anything"], []) == ("anything", False)


def test_a_word_is_found_across_pieces() -> None:
    assert let_through(["one E", "N", "D two"], ["END"]) == ("one ", True)


def test_only_what_may_become_a_word_is_held_back() -> None:
    stop_words = StopWords(["\n\nHuman:"], keep_word=False)
    assert stop_words.feed("Hello\n") == "Hello"
    assert stop_words.feed("you\n\nHum") == "\nyou"
    assert stop_words.feed("ans") == "\n\nHumans"


def test_nothing_gets_through_after_a_word() -> None:
    stop_words = StopWords(["x"], keep_word=False)
    assert stop_words.feed("ax") == "a"
    assert stop_words.feed("bc") == stop_words.finish() == ""
    assert stop_words.found


def test_characters_of_patterns_are_plain_text() -> None:
    assert let_through(["a.c a*c"], ["a*c"]) == ("a.c ", True)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("xabcdy", ["bc", "abcd"], "xa"),  # "bc" is complete before "abcd" is
        ("xabcy", ["bc", "abc"], "x"),  # both are complete at once: the longer one
        ("xaby", ["ab", "abc"], "x"),
        ("aaab", ["aab"], "a"),
        ("xabab", ["abac", "bab"], "xa"),
    ],
)
def test_the_word_that_is_complete_first_counts(text: str, words: list[str], expected: str) -> None:
    assert let_through([text], words) == (expected, True)


@pytest.mark.parametrize("keep_word", [True, False])
def test_it_does_not_matter_where_the_text_is_cut(keep_word: bool) -> None:
    rng = random.Random(0)
    for _ in range(5000):
        words = ["".join(rng.choices("ab\n", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abc\n", k=rng.randint(0, 14)))
        whole = let_through([text], words, keep_word=keep_word)
        pieces = cut(text, rng)
        assert let_through(pieces, words, keep_word=keep_word) == whole, (pieces, words)
        assert whole[1] == any(word in text for word in words)
        assert text.startswith(whole[0])
