"""Vocabularies that mean the same by their ids, and others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gallama.engines.draft_vocabulary import check_same_vocabulary
from gallama.errors import InvalidConfig
from gallama.generation import Vocabulary


def test_a_vocabulary_is_shared_with_one_of_the_same_tokens(byte_vocabulary: Vocabulary) -> None:
    assert check_same_vocabulary(byte_vocabulary, byte_vocabulary) == len(byte_vocabulary.tokens)


def test_padding_at_the_end_of_a_vocabulary_changes_nothing(byte_vocabulary: Vocabulary) -> None:
    padded = replace(byte_vocabulary, tokens=(*byte_vocabulary.tokens, b"", b""), fingerprint="padded")
    assert check_same_vocabulary(byte_vocabulary, padded) == len(byte_vocabulary.tokens)
    assert check_same_vocabulary(padded, byte_vocabulary) == len(byte_vocabulary.tokens)


def test_what_ends_an_answer_may_be_something_else_to_each(byte_vocabulary: Vocabulary) -> None:
    tokens = list(byte_vocabulary.tokens)
    tokens[ord("!")] = b""
    ends = byte_vocabulary.end_token_ids | {ord("!")}
    other = replace(byte_vocabulary, tokens=tuple(tokens), end_token_ids=ends, fingerprint="other")
    assert check_same_vocabulary(byte_vocabulary, other) == len(tokens)
    assert check_same_vocabulary(other, byte_vocabulary) == len(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "more"}, "'new'"),
        ({"tokens": "other"}, "token 0 is 'x' to the one"),
        ({"tokens": "blank"}, "token 97 is none to the one and 'a' to the other"),
        ({"tokens": "padded", "control_tokens": {"<|end|>": 257}}, "257"),
        ({"tokens": "padded", "control_tokens": {"<|end|>": 257, "[TOOL_CALLS]": 256}}, "TOOL_CALLS"),
    ],
)
def test_vocabularies_that_differ_are_refused(
    byte_vocabulary: Vocabulary, changes: dict[str, Any], message: str
) -> None:
    tokens = byte_vocabulary.tokens
    kinds = {
        "more": (*tokens, b"new"),
        "other": (b"x", *tokens[1:], b""),
        "blank": (*tokens[:97], b"", *tokens[98:]),
        "padded": (*tokens, b""),
    }
    changes = {**changes, "tokens": kinds[changes["tokens"]], "fingerprint": "other"}
    draft = replace(byte_vocabulary, **changes)
    with pytest.raises(InvalidConfig, match=message):
        check_same_vocabulary(byte_vocabulary, draft)
    with pytest.raises(InvalidConfig, match="another vocabulary"):
        check_same_vocabulary(draft, byte_vocabulary)
