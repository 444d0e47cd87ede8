"""What the embedded model's tokens are, told by the gateway."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest

MODEL = "smollm2-135m"
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the capital of France? <|im_end|>"},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def ask(gateway_url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    with httpx.Client(base_url=gateway_url, timeout=60, trust_env=False) as client:
        answer = client.post(path, json={"model": MODEL, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [WEATHER]},
        {"tools": [WEATHER], "tool_choice": "none"},
        {"response_format": {"type": "json_object"}},
        {"leading_prompt": "It is "},
    ],
    ids=str,
)
def test_messages_have_as_many_tokens_as_the_usage_of_their_chat_says(
    gateway_url: str, fields: dict[str, Any]
) -> None:
    body = {"messages": MESSAGES, **fields}
    count = ask(gateway_url, "/v1/tokenize", body)["count"]
    chat = ask(gateway_url, "/v1/chat/completions", {**body, "max_tokens": 1})
    assert count == chat["usage"]["prompt_tokens"]


def test_any_text_comes_back_from_its_tokens(gateway_url: str) -> None:
    rng = random.Random(0)
    alphabet = "abc XYZ\n\t0129.,{}\"'äß€漢字😀\0"
    texts = ["", *("".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(20))]
    for text in texts:
        tokens = ask(gateway_url, "/v1/tokenize", {"prompt": text})["tokens"]
        assert ask(gateway_url, "/v1/detokenize", {"tokens": tokens}) == {"prompt": text}


def test_the_texts_of_tokens_make_the_text(gateway_url: str) -> None:
    answer = ask(gateway_url, "/v1/tokenize", {"prompt": "Hello, world!", "return_token_strs": True})
    assert "".join(answer["token_strs"]) == "Hello, world!"
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])


def test_a_token_that_the_model_does_not_have_is_refused(gateway_url: str) -> None:
    with httpx.Client(base_url=gateway_url, trust_env=False) as client:
        answer = client.post("/v1/detokenize", json={"model": MODEL, "tokens": [0, 10**6]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tokens"
