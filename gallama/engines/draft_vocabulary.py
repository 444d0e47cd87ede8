"""Whether a small model can guess tokens for a large one: each id must mean the same to both."""

from __future__ import annotations

from itertools import zip_longest

from gallama.errors import InvalidConfig
from gallama.generation import Vocabulary


def check_same_vocabulary(target: Vocabulary, draft: Vocabulary) -> int:
    """How many tokens both have, from the first on.

    One may have more than its sibling where those are mere padding: without text and name.

    Raises:
        InvalidConfig: the ids mean different things; the message has the first that does.
    """
    if target.fingerprint != draft.fingerprint:
        _check_meanings(target, draft)
    return min(len(target.tokens), len(draft.tokens))


def _check_meanings(target: Vocabulary, draft: Vocabulary) -> None:
    pairs = zip_longest(_meanings(target), _meanings(draft), fillvalue=b"")
    for token, (meaning, guess) in enumerate(pairs):
        # The text of a token that ends answers is not told.
        is_end = (not meaning and token in target.end_token_ids) or (
            not guess and token in draft.end_token_ids
        )
        if meaning != guess and not is_end:
            raise InvalidConfig(
                f"The draft model has another vocabulary ({len(draft.tokens)} tokens) than the model"
                f" ({len(target.tokens)} tokens): token {token} is {_shown(guess)} to the one and"
                f" {_shown(meaning)} to the other. Name a `draft_model_id` of the same family."
            )


def _meanings(vocabulary: Vocabulary) -> list[bytes]:
    """The text of each token, or its name where it is a control token; b"" for padding."""
    meanings = list(vocabulary.tokens)
    for name, token in vocabulary.control_tokens.items():
        meanings[token] = name.encode()
    return meanings


def _shown(meaning: bytes) -> str:
    return repr(meaning.decode(errors="backslashreplace")) if meaning else "none"
