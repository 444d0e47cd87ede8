"""What a client wants to know of a model's tokens. Nothing here knows HTTP."""

from __future__ import annotations

from msgspec import Struct

from gallama.conversation import ChatRequest


class TokenizeRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Of a text, or of the prompt that a conversation makes."""

    request_id: str
    model: str
    text: str = ""
    add_special_tokens: bool = True
    """Of a text: whether to begin and end it as the model's prompts do. Special tokens that are written in it
    are recognised either way."""
    chat: ChatRequest | None = None
    """Instead of a text."""


class TokenizedText(Struct, frozen=True, kw_only=True, tag=True):
    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    """The text of each, with U+FFFD where its bytes are no whole character; special tokens by name."""
    context_length: int


class DetokenizeRequest(Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    model: str
    token_ids: tuple[int, ...]


class DetokenizedText(Struct, frozen=True, kw_only=True, tag=True):
    text: str
    """Special tokens by name."""
