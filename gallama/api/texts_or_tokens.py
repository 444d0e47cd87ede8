"""Texts or token ids, one or many, as OpenAI's bodies have them."""

from __future__ import annotations

from typing import Any

from pydantic import Discriminator


def _form_of(value: Any) -> str | None:
    """Which of its forms an input has, by its first part; None: it has none of them."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    match value:
        case [int(), *_]:
            return "token ids"
        case [list(), *_]:
            return "lists of token ids"
    return "texts"


BY_FORM = Discriminator(
    _form_of,
    custom_error_type="input",
    custom_error_message="must be a string, a list of token ids, or a list of one of these",
)
"""Chooses among the variants with the tags "text", "texts", "token ids" and "lists of token ids"."""


def one_by_one(given: str | list[str] | list[int] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """Each text, or its token ids."""
    if isinstance(given, str):
        return (given,)
    texts = [part for part in given if isinstance(part, str)]
    if texts:
        return tuple(texts)
    token_ids = [part for part in given if isinstance(part, int)]
    if token_ids:
        return (tuple(token_ids),)
    return tuple(tuple(part) for part in given if isinstance(part, list))
