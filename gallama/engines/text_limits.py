"""Limits that hold before a text is cut up into tokens, which takes a megabyte up to a second.

No tokenizer can be stopped in the middle: so a text that is too long in any case is not even begun, and many
texts are cut up in parts, between which a call may be given up.
"""

from __future__ import annotations

from collections.abc import Sequence

from gallama.errors import TextTooLong

_TEXTS_AT_ONCE, _CHARACTERS_AT_ONCE = 64, 2**20
# No text has so few tokens.
_MAX_CHARACTERS_PER_TOKEN = 1000


def check_characters(
    characters: int, name: str, *, context_length: int, param: str, with_what: str = ""
) -> None:
    """
    Args:
        characters: of a text, with all that is read together with it.
        name: the text's place in the request.
        context_length: the most tokens that the model takes.
        with_what: what is read together with it, as part of a sentence.

    Raises:
        TextTooLong: so many characters surely have more tokens than the model takes.
    """
    if characters > context_length * _MAX_CHARACTERS_PER_TOKEN:
        raise TextTooLong(
            f"`{name}` has {with_what}{characters} characters; the model takes {context_length} tokens.",
            param=param,
        )


def reading_parts(characters: Sequence[int]) -> list[range]:
    """Divide texts into those that are cut up in one go.

    Args:
        characters: of each text; ids have none, as they are not cut up.

    Returns:
        Indexes of the texts of each part. A text that has more characters than a part may have is alone.
    """
    parts = []
    start, room = 0, _CHARACTERS_AT_ONCE
    for index, length in enumerate(characters):
        if index > start and (length > room or index - start == _TEXTS_AT_ONCE):
            parts.append(range(start, index))
            start, room = index, _CHARACTERS_AT_ONCE
        room -= length
    return [*parts, range(start, len(characters))] if characters else []
