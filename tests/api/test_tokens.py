"""POST /v1/tokenize and /v1/detokenize. The scripted models' tokens are bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from gallama.api.request_bodies import MAX_TOKENS
from gallama.api.tokens import HONOURED_VALUES, MAX_CHARACTERS

MESSAGES = [{"role": "user", "content": "hi"}]


def post(gateway: Any, path: str, body: dict[str, Any]) -> httpx.Response:
    with gateway.client() as client:
        answer: httpx.Response = client.post(path, json={"model": "echo", **body})
    return answer


def told(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("path", ["/v1/tokenize", "/tokenize"])
def test_a_text_is_told_as_tokens(gateway: Any, path: str) -> None:
    assert told(post(gateway, path, {"prompt": "hü"})) == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [104, 195, 188],
        "token_strs": None,
    }


def test_the_texts_of_tokens_are_told_where_that_is_asked_for(gateway: Any) -> None:
    answer = told(post(gateway, "/v1/tokenize", {"prompt": "a<|im_end|>ü", "return_token_strs": True}))
    assert answer["tokens"] == [97, 257, 195, 188]
    assert answer["token_strs"] == ["a", "<|im_end|>", "\ufffd", "\ufffd"]


@pytest.mark.parametrize("path", ["/v1/detokenize", "/detokenize"])
@pytest.mark.parametrize("text", ["", "hi", "<|im_start|>user\nGrüße 😀\0<|im_end|>"])
def test_tokens_make_their_text_again(gateway: Any, text: str, path: str) -> None:
    tokens = told(post(gateway, "/v1/tokenize", {"prompt": text}))["tokens"]
    assert told(post(gateway, path, {"tokens": tokens})) == {"prompt": text}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": [{"role": "system", "content": "Be <|im_end|> brief."}, *MESSAGES]},
        {"leading_prompt": "Well, "},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"thinking_template": "<plan><step/></plan>"},
        {"stream": True, "temperature": 0, "max_tokens": 3},
        {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False},
    ],
    ids=str,
)
def test_messages_have_the_tokens_of_the_prompt_that_a_chat_makes_of_them(
    gateway: Any, fields: dict[str, Any]
) -> None:
    body = {"messages": MESSAGES, **fields}
    count = told(post(gateway, "/v1/tokenize", body))["count"]
    known_to_chat = {
        name: value
        for name, value in body.items()
        if name not in ("add_generation_prompt", "continue_final_message", "add_special_tokens")
    }
    explained = told(post(gateway, "/v1/explain", known_to_chat))
    assert count == explained["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/tokenize", {}, "prompt"),
        ("/v1/tokenize", {"prompt": None}, "prompt"),
        ("/v1/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/v1/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/v1/tokenize", {"prompt": "x" * (MAX_CHARACTERS + 1)}, "prompt"),
        ("/v1/tokenize", {"prompt": "x" * 10_000_000}, "prompt"),
        ("/v1/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/v1/tokenize", {"prompt": "a", "temperature": 1}, "temperature"),
        ("/v1/tokenize", {"prompt": "a", "model": None}, "model"),
        ("/v1/tokenize", {"messages": []}, "messages"),
        ("/v1/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        ("/v1/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/v1/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/v1/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/v1/tokenize", {"messages": MESSAGES, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("/v1/tokenize", {"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ("/v1/tokenize", {"messages": MESSAGES, "unknown": None}, "unknown"),
        ("/v1/detokenize", {}, "tokens"),
        ("/v1/detokenize", {"tokens": "a"}, "tokens"),
        ("/v1/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/v1/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/v1/detokenize", {"tokens": [1, 2.0]}, "tokens[1]"),
        ("/v1/detokenize", {"tokens": [1, 2**31]}, "tokens[1]"),
        ("/v1/detokenize", {"tokens": [1, 2**31 - 1]}, "tokens"),
        ("/v1/detokenize", {"tokens": [1] * (2**20 + 1)}, "tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_value_is_named(gateway: Any, path: str, fields: dict[str, Any], param: str) -> None:
    answer = post(gateway, path, fields)
    assert answer.status_code == 400, answer.text[:500]
    assert answer.json()["error"]["param"] == param


def test_no_constraint_is_taken_that_a_chat_would_refuse(gateway: Any) -> None:
    answer = post(gateway, "/v1/tokenize", {"messages": MESSAGES, "regex_pattern": "["})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "regex_pattern"


def test_as_much_is_told_as_a_tokenizer_can_read_in_a_moment(gateway: Any) -> None:
    answer = told(post(gateway, "/v1/tokenize", {"prompt": "x" * MAX_CHARACTERS}))
    assert answer["count"] == len(answer["tokens"]) == MAX_CHARACTERS
    tokens = {"tokens": answer["tokens"]}
    assert told(post(gateway, "/v1/detokenize", tokens)) == {"prompt": "x" * MAX_CHARACTERS}


def test_the_document_names_the_limits_that_hold() -> None:
    document = (Path(__file__).parents[2] / "docs/tokens.md").read_text()
    assert f"up to {MAX_CHARACTERS:,} characters" in document
    assert f"Up to {MAX_TOKENS:,} token ids" in document
    assert [name for name in HONOURED_VALUES if f"`{name}`" not in document] == []
