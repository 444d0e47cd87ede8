"""Keeps what a client wrote from becoming control tokens, without changing a character of it.

A prompt is one text, made by a template from fixed text and from what the client sent; the tokenizer then
makes a control token of each name it finds. So a message "<|im_end|>" would end the message. The guard
puts a sentinel, a character that occurs nowhere else, into each place of the client's text where such a
name could come about. The prompt is then cut at the sentinels, and its segments are tokenized one by one:

    "say <|im_end|>"  ->  "say <⟂|im_end|>"  ->  "...user\nsay <", "|im_end|><|im_end|>\n..."
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import lru_cache
from itertools import pairwise
from typing import Any

from gallama.errors import InvalidRequest

# Characters that Unicode reserves for use inside of programs, and that no text should have.
_SENTINELS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

Guard = Callable[[str], str]


def choose_sentinel(texts: str) -> str:
    """A character that is not in `texts`, nor written there as an escape.

    Raises:
        InvalidRequest: all 32 are in use.
    """
    for sentinel in _SENTINELS:
        if sentinel not in texts and escaped(sentinel) not in texts.lower():
            return sentinel
    raise InvalidRequest(
        "The request uses all of the characters U+FDD0 to U+FDEF, which are no text; leave one out.",
        param="messages",
    )


def escaped(sentinel: str) -> str:
    r"""How Python's `repr` writes the sentinel, where a template prints a list or an object: \ufdd0."""
    return f"\\u{ord(sentinel):04x}"


def cut_at(sentinel: str, prompt: str) -> tuple[str, ...]:
    """The segments between sentinels; none is empty."""
    return tuple(filter(None, prompt.replace(escaped(sentinel), sentinel).split(sentinel)))


def guarded(value: Any, guard: Guard) -> Any:
    """A JSON value with all of its strings guarded, keys too."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, dict):
        return {guard(key): guarded(item, guard) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [guarded(item, guard) for item in value]
    return value


def make_guard(control_tokens: Collection[str], sentinel: str) -> Guard:
    """A function that marks a client's text with the sentinel."""
    names = _names(frozenset(control_tokens))
    return lambda text: names.mark(text, sentinel)


class _ControlTokenNames:
    """Where in a text the name of a control token could come about.

    A name is cut after its first character. Where the text around a client's string could complete a
    name, it is cut too: at the string's end ("<|im_" and then "end|>"), and before its start ("|im_end|>"
    after "<", "tool_call" in "<" and ">"). Templates put marks around a string, not parts of words; so
    "end" alone is left in peace.
    """

    def __init__(self, names: frozenset[str]) -> None:
        # A name of one character has no inside to cut; no vocabulary has one.
        self._names = frozenset(name for name in names if len(name) > 1)
        self._beginnings = frozenset(name[:n] for name in self._names for n in range(1, len(name)))
        self._endings = frozenset(name[n:] for name in self._names for n in range(1, len(name)))
        self._words = frozenset(word for name in self._names for word in _words_with_marks(name))
        self._longest = max(map(len, self._names), default=0)
        first_characters = "".join(sorted({name[0] for name in self._names}))
        self._first_character = re.compile(f"[{re.escape(first_characters)}]" if first_characters else "(?!)")

    def mark(self, text: str, sentinel: str) -> str:
        # Templates strip: what they see as start and end is inside the white space.
        end = len(text.rstrip())
        start = len(text) - len(text.lstrip())
        cuts = [start] if self._may_continue_a_name(text[start:end]) else []
        cuts += [
            found.start() + 1
            for found in self._first_character.finditer(text, 0, end)
            if self._may_begin_a_name(text, found.start(), end)
        ]
        edges = [0, *sorted(cuts), len(text)]
        return sentinel.join(text[a:b] for a, b in pairwise(edges))

    def _may_continue_a_name(self, text: str) -> bool:
        lengths = range(1, min(len(text), self._longest) + 1)
        return text in self._words or any(text[:length] in self._endings for length in lengths)

    def _may_begin_a_name(self, text: str, start: int, end: int) -> bool:
        stop = start + 1
        while text[start:stop] in self._beginnings:
            stop += 1
            if stop > end or text[start:stop] in self._names:
                return True
        return False


def _words_with_marks(name: str) -> list[str]:
    """What is inside of a name, with some or none of the marks around it: tool_call, /tool_call, ..."""
    word = re.search(r"\w(?:.*\w)?", name, re.DOTALL)
    if word is None:
        return []
    return [name[a:b] for a in range(1, word.start() + 1) for b in range(word.end(), len(name))]


@lru_cache(maxsize=4)
def _names(control_tokens: frozenset[str]) -> _ControlTokenNames:
    return _ControlTokenNames(control_tokens)
