"""Finds the first of several words in text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence


class StopWords:
    """Lets text through up to the first stop word; holds back only what may yet become one."""

    def __init__(self, words: Sequence[str], *, keep_word: bool) -> None:
        """
        Args:
            words: none of them empty.
            keep_word: whether the word that is found is let through as well.
        """
        # Of two words that begin at one place the one given first is found; so the longer goes first.
        longest_first = sorted(words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if words else None
        self._starts = {word[:length] for word in words for length in range(1, len(word))}
        self._longest_start = max(map(len, self._starts), default=0)
        self._keep_word = keep_word
        self._held_back = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is certain to stand in front of any stop word; nothing once one was found."""
        if self._pattern is None or self.found:
            return "" if self.found else text
        text = self._held_back + text
        match = self._pattern.search(text)
        if match:
            self.found = True
            return text[: match.end() if self._keep_word else match.start()]
        kept = len(text) - self._possible_start(text)
        self._held_back = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held_back = self._held_back, ""
        return "" if self.found else rest

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop word may begin with."""
        longest = min(len(text), self._longest_start)
        return next((length for length in range(longest, 0, -1) if text[-length:] in self._starts), 0)
