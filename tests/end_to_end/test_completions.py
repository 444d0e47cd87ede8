"""POST /v1/completions with the embedded model: what the seeds show, and what a real tokenizer asks for."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import requests
from openai import AsyncOpenAI, BadRequestError, OpenAI

MODEL = "smollm2-135m"
TEXT = "The capital of France is Paris. The capital of Italy is"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
async def async_client(gateway_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(gateway_url: str, **body: Any) -> dict[str, Any]:
    url = f"{gateway_url}/v1/completions"
    answer = httpx.post(url, json={"model": MODEL, **body}, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def tokenized(gateway_url: str, text: str) -> list[int]:
    answer = httpx.post(
        f"{gateway_url}/v1/tokenize", json={"model": MODEL, "prompt": text}, timeout=60, trust_env=False
    )
    token_ids: list[int] = answer.json()["tokens"]
    return token_ids


# The seeds' own examples


def test_the_story_of_the_first_readme(client: OpenAI) -> None:
    completion = client.completions.create(
        model="smollm2-135m",
        prompt="Tell me a story about a Llama in 200 words",
        max_tokens=1000,
        temperature=0,
    )
    (choice,) = completion.choices
    assert choice.text
    assert choice.finish_reason in ("stop", "length")
    assert completion.usage is not None
    assert 0 < completion.usage.completion_tokens <= 1000


def test_the_request_of_the_older_readme(gateway_url: str) -> None:
    url = f"{gateway_url}/v1/completions"
    payload: dict[str, Any] = {
        "model": "orca_mini_3b",
        "prompt": "Hello, my name is",
        "max_tokens": 30,
        "top_p": 0.9,
        "temperature": 0.9,
        "stop": ["\n"],
    }
    response = requests.post(url, json=payload)
    answer = response.json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == MODEL, "the only model answers, and says so"
    (choice,) = answer["choices"]
    assert "\n" not in choice["text"]
    assert (choice["index"], choice["logprobs"]) == (0, None)
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["completion_tokens"] <= 30
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_chat_of_the_older_readme(gateway_url: str) -> None:
    url = f"{gateway_url}/v1/chat/completions"
    payload: dict[str, Any] = {
        "model": "orca_mini_3b",
        "messages": [{"role": "user", "content": "Hello there!"}],
        "max_tokens": 30,
        "top_p": 0.9,
        "temperature": 0.9,
        "stop": ["\n"],
    }
    response = requests.post(url, json=payload)
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert "\n" not in choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] <= 30


# A text is gone on with as it stands


def test_a_text_is_gone_on_with(client: OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=2, temperature=0)
    assert reply.choices[0].text.startswith(" Rome")


async def test_streamed_text_is_the_whole_one(async_client: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": [TEXT, "2 + 2 ="], "max_tokens": 12, "temperature": 0}
    whole = await async_client.completions.create(**fields)
    streamed = ["", ""]
    async for chunk in await async_client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in whole.choices]


def test_a_prompt_in_token_ids_is_the_same_prompt(gateway_url: str) -> None:
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "echo": True}
    token_ids = tokenized(gateway_url, TEXT)
    as_text = post(gateway_url, prompt=TEXT, **fields)
    as_ids = post(gateway_url, prompt=token_ids, **fields)
    assert as_ids["choices"] == as_text["choices"]
    assert as_ids["usage"]["prompt_tokens"] == as_text["usage"]["prompt_tokens"] == len(token_ids)
    assert as_ids["choices"][0]["text"].startswith(TEXT)


def test_an_end_token_ends_the_answer_and_is_no_part_of_it(gateway_url: str) -> None:
    prompt = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    (choice,) = post(gateway_url, prompt=prompt, max_tokens=200, temperature=0)["choices"]
    assert choice["finish_reason"] == "stop"
    assert "<|im_end|>" not in choice["text"]


def test_several_answers_differ_and_come_again_with_the_seed(gateway_url: str) -> None:
    fields = {"prompt": "Once upon a time", "n": 4, "max_tokens": 8, "seed": 7, "temperature": 1}
    texts = [choice["text"] for choice in post(gateway_url, **fields)["choices"]]
    assert len(set(texts)) > 1
    assert texts == [choice["text"] for choice in post(gateway_url, **fields)["choices"]]


def test_a_suffix_is_refused_by_a_model_that_does_not_fill_in(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="def add(a, b):\n    return ", suffix="\n")
    assert refused.value.param == "suffix"


def test_a_model_with_infill_tokens_fills_in(gateway_url: str, client: OpenAI, infilling_path: Path) -> None:
    def call(path: str, **body: Any) -> Any:
        answer = httpx.post(gateway_url + path, json=body, timeout=60, trust_env=False)
        assert answer.is_success, answer.text
        return answer.json()

    spec = {"model_id": str(infilling_path), "model_name": "fills-in", "max_seq_len": 512}
    task = call("/add_model", **spec)
    try:
        deadline = time.monotonic() + 60
        while task["status"] in ("queued", "loading"):
            assert time.monotonic() < deadline, task
            time.sleep(0.05)
            task = httpx.get(f"{gateway_url}/task_status/{task['task_id']}", trust_env=False).json()
        assert task["status"] == "completed", task
        prompt, suffix = "def add(a, b):\n    ", "\n\nprint(add(1, 2))"
        reply = client.completions.create(model="fills-in", prompt=prompt, suffix=suffix, max_tokens=4)
        assert reply.usage is not None
        lengths = [len(tokenized(gateway_url, text)) for text in (prompt, suffix)]
        assert reply.usage.prompt_tokens == 3 + sum(lengths)
        assert 1 <= reply.usage.completion_tokens <= 4
    finally:
        call("/remove_model", model_name="fills-in")


# Log probabilities


def test_log_probabilities_stand_where_their_tokens_do(gateway_url: str) -> None:
    prompt = "Grüße, 世界! 😀 say:"
    (choice,) = post(gateway_url, prompt=prompt, max_tokens=12, logprobs=3, echo=True, seed=1)["choices"]
    logprobs = choice["logprobs"]
    assert len({len(values) for values in logprobs.values()}) == 1
    for token, place in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][place:].startswith(token)
    assert any(token.startswith("bytes:") for token in logprobs["tokens"])
    for token, logprob, top in list(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    )[1:]:
        assert top[token] == logprob <= max(top.values())
        assert 3 <= len(top) <= 4
        assert sum(map(math.exp, top.values())) <= 1.001


def test_an_echo_of_nothing_else_scores_a_text(gateway_url: str) -> None:
    """As programs that compare models on multiple choice ask."""

    def score(ending: str) -> float:
        fields = {"max_tokens": 0, "logprobs": 1, "echo": True, "temperature": 0}
        context = len(tokenized(gateway_url, TEXT))
        (choice,) = post(gateway_url, prompt=tokenized(gateway_url, TEXT + ending), **fields)["choices"]
        assert choice["text"] == TEXT + ending
        logprobs = choice["logprobs"]["token_logprobs"]
        assert logprobs[0] is None
        return float(sum(logprobs[context:]))

    assert score(" Rome") > score(" Paris") > score(" spoon")


def test_the_score_of_a_token_is_the_same_in_the_prompt_and_in_the_answer(gateway_url: str) -> None:
    fields: dict[str, Any] = {"logprobs": 1, "echo": True, "temperature": 0}
    (made,) = post(gateway_url, prompt=TEXT, max_tokens=4, **fields)["choices"]
    (read,) = post(gateway_url, prompt=made["text"], max_tokens=0, **fields)["choices"]
    assert read["logprobs"]["tokens"] == made["logprobs"]["tokens"]
    assert read["logprobs"]["token_logprobs"][1:] == pytest.approx(
        made["logprobs"]["token_logprobs"][1:], abs=0.05
    )


# What must hold holds


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_regex_holds(gateway_url: str, temperature: float) -> None:
    pattern = r"(Yes|No), because [a-z ]{5,20}\."
    answer = post(
        gateway_url,
        prompt=["Is water wet?", "Is fire cold?"],
        n=2,
        regex_pattern=pattern,
        max_tokens=60,
        temperature=temperature,
        seed=3,
    )
    assert len(answer["choices"]) == 4
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["text"])
        assert choice["guarantee"] | {"kind": "regex", "complete": True} == choice["guarantee"]


def test_a_schema_holds_behind_an_echo(gateway_url: str) -> None:
    prompt = "Alice is 30 years old. As JSON: "
    named = {"name": "person", "schema": PERSON, "strict": True}
    response_format = {"type": "json_schema", "json_schema": named}
    answer = post(
        gateway_url,
        prompt=prompt,
        response_format=response_format,
        echo=True,
        max_tokens=100,
        temperature=1.5,
    )
    (choice,) = answer["choices"]
    assert choice["text"].startswith(prompt)
    jsonschema.validate(json.loads(choice["text"].removeprefix(prompt)), PERSON)
    assert choice["guarantee"]["complete"]


@pytest.mark.parametrize(
    "grammar",
    [
        {"syntax": "lark", "definition": 'start: sum ("," sum)~2\nsum: NUM "+" NUM\nNUM: /[0-9]{1,2}/'},
        {
            "syntax": "gbnf",
            "definition": 'root ::= sum "," sum "," sum\nsum ::= num "+" num\nnum ::= [0-9] [0-9]?',
        },
    ],
    ids=["lark", "gbnf"],
)
def test_a_grammar_holds(gateway_url: str, grammar: dict[str, str]) -> None:
    (choice,) = post(gateway_url, prompt="Sums: ", grammar=grammar, max_tokens=60, temperature=1.5)["choices"]
    assert re.fullmatch(r"\d{1,2}\+\d{1,2}(,\d{1,2}\+\d{1,2}){2}", choice["text"])
