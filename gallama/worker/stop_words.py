"""Finds the first of several words in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopWords:
    """Lets text through up to the first stop word; holds back only what may yet become one.

    The first is the one that is complete first, and of those complete at once the longest. So the result
    does not depend on where the text is cut.
    """

    def __init__(self, words: Sequence[str], *, keep_word: bool) -> None:
        """
        Args:
            words: none of them empty.
            keep_word: whether the word that is found is let through as well.
        """
        self._words = tuple(words)
        self._starts = {word[:length] for word in words for length in range(1, len(word))}
        self._longest_start = max(map(len, self._starts), default=0)
        self._keep_word = keep_word
        self._held_back = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is certain to stand in front of any stop word; nothing once one was found."""
        if self.found:
            return ""
        text = self._held_back + text
        places = [(start + len(word), start) for word in self._words if (start := text.find(word)) >= 0]
        if places:
            self.found = True
            end, start = min(places)
            return text[: end if self._keep_word else start]
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
