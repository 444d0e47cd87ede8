"""What engines ask of a model's vocabulary."""

from __future__ import annotations

from dataclasses import replace

from gallama.generation import Vocabulary
from tests.conftest import BYTE_END, BYTE_MARKER


def test_ids_without_text_and_name_are_unused(byte_vocabulary: Vocabulary) -> None:
    tokens = byte_vocabulary.tokens
    assert byte_vocabulary.unused_token_ids() == []
    padded = replace(byte_vocabulary, tokens=(*tokens, b"", b"more", b""))
    assert padded.unused_token_ids() == [len(tokens), len(tokens) + 2]


def test_an_end_token_without_a_name_is_used(byte_vocabulary: Vocabulary) -> None:
    nameless = replace(byte_vocabulary, control_tokens={"[TOOL_CALLS]": BYTE_MARKER})
    assert not nameless.tokens[BYTE_END]
    assert nameless.unused_token_ids() == []


def test_what_is_computed_as_a_probe_is_what_prompts_begin_with(byte_vocabulary: Vocabulary) -> None:
    assert replace(byte_vocabulary, start_token_id=65).probe_token_id == 65
    assert byte_vocabulary.start_token_id is None
    assert byte_vocabulary.probe_token_id == BYTE_END
