"""Generated text in, pieces of text and of tool calls out, wherever the text was cut.

Made from the same envelope as the grammar, so the two cannot disagree; but it needs no grammar: whatever
does not have the envelope's form is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import groupby

from gallama.dialects.dialect import Dialect, control_token_pattern, visible_control_tokens

_WHITESPACE = " \t\r\n"
_FIRST_STAND_IN = 0xD800
# Bounds what is copied when a marker turns out to be text, and so keeps long texts linear.
_CHARACTERS_AT_ONCE = 1024
_LONGEST_NAME = 1024


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    call_index: int
    """0 for the first call of the answer."""
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPiece:
    """A piece of the JSON text of a call's arguments, exactly as the model wrote it."""

    call_index: int
    text: str


Piece = TextPiece | CallStarted | ArgumentsPiece


class Splitter:
    """Splits one answer. Holds back only what may yet turn out to be the envelope's.

    Each control token of the envelope is a stand-in character inside: a lone surrogate, which no decoded
    text contains. So where a marker is a control token, its name spelled out in text is no marker.
    """

    def __init__(
        self, dialect: Dialect, *, tools_offered: bool, control_tokens: Collection[str] = ()
    ) -> None:
        """
        Args:
            tools_offered: if not, everything is text.
            control_tokens: all control tokens of the model's vocabulary, by name.
        """
        names = sorted(visible_control_tokens(dialect, control_tokens))
        self._stand_ins = {name: chr(_FIRST_STAND_IN + index) for index, name in enumerate(names)}
        self._without_stand_ins = {ord(stand_in): None for stand_in in self._stand_ins.values()}

        envelope = dialect.envelope
        self._text_begin = self._with_stand_ins(envelope.text_begin)
        self._trigger = self._with_stand_ins(envelope.trigger)
        call_begin = self._with_stand_ins(envelope.call_begin)
        self._first_call = self._with_stand_ins(envelope.begin) + call_begin
        self._name_end = self._with_stand_ins(envelope.name_end)
        self._call_end = self._with_stand_ins(envelope.call_end)
        next_call = self._with_stand_ins(envelope.between) + call_begin
        self._next_call = next_call if envelope.parallel else None
        self._end = self._with_stand_ins(envelope.end)

        self._read_free_text = self._read_until_trigger if envelope.text_before_calls else self._read_plain
        self._read: Callable[[], bool] = self._read_plain
        if tools_offered:
            self._read = self._read_until_trigger if envelope.text_before_calls else self._read_start
        self._pending = ""
        self._call_begin = ""
        """What `_read_name` is after: needed again if it was no call."""
        self._pieces: list[Piece] = []
        self._calls_started = 0
        self._arguments = _ObjectScanner()

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after this text."""
        for start in range(0, len(text), _CHARACTERS_AT_ONCE):
            self._pending += text[start : start + _CHARACTERS_AT_ONCE]
            while self._read():
                pass
        return self._take_pieces()

    def feed_control_token(self, name: str) -> list[Piece]:
        """As `feed`, for a control token. One that is no part of the envelope carries no text."""
        stand_in = self._stand_ins.get(name)
        return [] if stand_in is None else self.feed(stand_in)

    def finish(self) -> list[Piece]:
        """The pieces that were held back, now that the answer has ended.

        What looked like the start of a trigger was text. A call that was cut before its arguments began
        is left out: nobody knows yet what it was to be.
        """
        if self._read in (self._read_start, self._read_until_trigger):
            self._put_text(len(self._pending))
        self._pending = ""
        return self._take_pieces()

    # Each of these reads from `_pending` and returns whether there may be more to read.

    def _read_plain(self) -> bool:
        self._put_text(len(self._pending))
        return False

    def _read_start(self) -> bool:
        """The start of an answer that is either text or calls."""
        if self._text_begin and self._take(self._text_begin):
            self._read = self._read_plain
            return True
        if self._text_begin.startswith(self._pending):
            return False
        if self._pending.startswith(self._trigger):
            self._read = self._read_first_call
            return True
        if self._trigger.startswith(self._pending):
            return False
        self._read = self._read_plain
        return True

    def _read_until_trigger(self) -> bool:
        position = self._pending.find(self._trigger)
        if position >= 0:
            self._put_text(position)
            self._read = self._read_first_call
            return True
        self._put_text(len(self._pending) - _overlap(self._pending, self._trigger))
        return False

    def _read_first_call(self) -> bool:
        if self._take(self._first_call):
            self._call_begin = self._first_call
            self._read = self._read_name
            return True
        if self._first_call.startswith(self._pending):
            return False
        self._put_text(1)  # a trigger without the rest; another one may begin at the next character
        self._read = self._read_free_text
        return True

    def _read_name(self) -> bool:
        name, _, rest = self._pending.partition(self._name_end)
        arguments = rest.lstrip(_WHITESPACE)
        if not arguments and len(self._pending) <= _LONGEST_NAME:
            return False
        if not arguments.startswith("{"):
            self._pending = self._call_begin + self._pending  # no call after all
            self._put_text(len(self._call_begin))
            self._read = self._read_free_text
            return True
        self._pieces.append(CallStarted(self._calls_started, self._visible(name)))
        self._calls_started += 1
        self._pending = rest
        self._arguments = _ObjectScanner()
        self._read = self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        end = self._arguments.find_end(self._pending)
        arguments = self._visible(self._pending[:end])
        if arguments:
            self._pieces.append(ArgumentsPiece(self._calls_started - 1, arguments))
        self._pending = "" if end is None else self._pending[end:]
        if end is not None:
            self._read = self._read_call_end
        return end is not None

    def _read_call_end(self) -> bool:
        if self._take(self._call_end):
            self._read = self._read_next_call
            return True
        if self._call_end.startswith(self._pending):
            return False
        self._read = self._read_free_text
        return True

    def _read_next_call(self) -> bool:
        if self._next_call is not None and self._take(self._next_call):
            self._call_begin = self._next_call
            self._read = self._read_name
            return True
        if self._end and self._take(self._end):
            self._read = self._read_free_text
            return True
        if (self._next_call or "").startswith(self._pending) or self._end.startswith(self._pending):
            return False
        self._read = self._read_free_text
        return True

    def _take(self, expected: str) -> bool:
        if not self._pending.startswith(expected):
            return False
        self._pending = self._pending[len(expected) :]
        return True

    def _put_text(self, length: int) -> None:
        text = self._visible(self._pending[:length])
        self._pending = self._pending[length:]
        if text:
            self._pieces.append(TextPiece(text))

    def _take_pieces(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return _joined(pieces)

    def _with_stand_ins(self, text: str) -> str:
        return control_token_pattern(self._stand_ins).sub(lambda found: self._stand_ins[found[0]], text)

    def _visible(self, text: str) -> str:
        return text.translate(self._without_stand_ins) if self._without_stand_ins else text


class _ObjectScanner:
    """Finds where a JSON object ends in text that comes in pieces."""

    _OUTSIDE_STRINGS = re.compile(r'["{}\[\]]')
    _INSIDE_STRINGS = re.compile(r'["\\]')

    def __init__(self) -> None:
        self._depth = 0
        self._inside_string = False
        self._after_backslash = False

    def find_end(self, text: str) -> int | None:
        """How many characters of `text` still belong to the object; None: all, and it goes on."""
        position = 1 if self._after_backslash and text else 0
        self._after_backslash = self._after_backslash and not text
        while True:
            pattern = self._INSIDE_STRINGS if self._inside_string else self._OUTSIDE_STRINGS
            found = pattern.search(text, position)
            if found is None:
                return None
            position = found.end()
            if found[0] == "\\":
                self._after_backslash = position == len(text)
                position += 1
            elif found[0] == '"':
                self._inside_string = not self._inside_string
            else:
                self._depth += 1 if found[0] in "{[" else -1
                if self._depth == 0:
                    return position


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same pieces, neighbours of one kind made one."""
    joined: list[Piece] = []
    for kind, group in groupby(pieces, key=type):
        if kind is TextPiece:
            joined.append(TextPiece("".join(piece.text for piece in group if isinstance(piece, TextPiece))))
        else:
            joined.extend(group)
    return joined


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest end of `text` that a trigger may begin with."""
    longest = min(len(text), len(trigger) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(trigger[:n])), 0)
