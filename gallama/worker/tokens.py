"""What a model's tokens are, for whoever counts them."""

from __future__ import annotations

from collections.abc import Sequence

from gallama.errors import InvalidRequest
from gallama.generation import Engine, Vocabulary
from gallama.tokenization import DetokenizedText, TokenizedText


def tokenize(engine: Engine, text: str, *, add_special_tokens: bool) -> list[int]:
    """The tokens of a text, as those of a prompt: control tokens that are written in it are recognised.

    Args:
        add_special_tokens: whether to begin it as the model's prompts begin.
    """
    token_ids = engine.tokenize(text)
    start = engine.vocabulary.start_token_id
    if add_special_tokens and start is not None and token_ids[:1] != [start]:
        token_ids.insert(0, start)
    return token_ids


def to_tokenized_text(engine: Engine, token_ids: Sequence[int]) -> TokenizedText:
    texts = texts_of(engine.vocabulary, token_ids)
    return TokenizedText(
        token_ids=tuple(token_ids),
        token_texts=tuple(text.decode(errors="replace") for text in texts),
        context_length=engine.context_length,
    )


def detokenize(engine: Engine, token_ids: Sequence[int]) -> DetokenizedText:
    """
    Raises:
        InvalidRequest: the model has no such token.
    """
    size = len(engine.vocabulary.tokens)
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < size:
            raise InvalidRequest(
                f"`tokens[{position}]` is {token_id}; this model has the tokens 0 to {size - 1}.",
                param="tokens",
            )
    return DetokenizedText(text=b"".join(texts_of(engine.vocabulary, token_ids)).decode(errors="replace"))


def texts_of(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[bytes]:
    """The text of each token; of control tokens their names."""
    names = {token_id: name.encode() for name, token_id in vocabulary.control_tokens.items()}
    return [names.get(token_id, vocabulary.tokens[token_id]) for token_id in token_ids]
