"""POST /v1/completions on a real gateway, with OpenAI's own client where it can say it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from openai.types import Completion, completion_create_params

from gallama.api.openai_completion_request import MAX_ANSWERS, CompletionBody
from gallama.api.openai_completions import PROMPTS_AT_ONCE
from gallama.api.openai_generation_body import MAX_CHOICES

PROMPT = "Grüß Gott 😀"
BYTES = list(PROMPT.encode())


@pytest.fixture
def client(gateway: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
async def async_client(gateway: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def post(gateway: Any, **body: Any) -> Any:
    with gateway.client() as http:
        return http.post("/v1/completions", json={"model": "echo", "max_tokens": 100, **body})


def choices_of(gateway: Any, **body: Any) -> list[dict[str, Any]]:
    answer = post(gateway, **body)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def texts_of(gateway: Any, **body: Any) -> list[str]:
    return [choice["text"] for choice in choices_of(gateway, **body)]


def error_of(gateway: Any, **body: Any) -> tuple[int, str, str]:
    answer = post(gateway, **body)
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def chunks_of(gateway: Any, **body: Any) -> list[dict[str, Any]]:
    body = {"model": "echo", "max_tokens": 100, "stream": True, **body}
    with gateway.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def put_together(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The whole choices that a stream's chunks add up to."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = choices.setdefault(choice["index"], {"index": choice["index"], "text": "", "logprobs": None})
        whole["text"] += choice["text"]
        if choice["logprobs"] is not None:
            lists = whole["logprobs"] or {name: [] for name in choice["logprobs"]}
            whole["logprobs"] = {name: lists[name] + more for name, more in choice["logprobs"].items()}
        whole |= {
            key: value for key, value in choice.items() if key in ("finish_reason", "guarantee") and value
        }
    return [choices[index] for index in sorted(choices)]


# What goes in, what comes out


def test_the_answer_is_what_the_model_said(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="echo", prompt=PROMPT, max_tokens=100)
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")
    assert reply.model == "echo"
    assert reply.system_fingerprint is not None
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (PROMPT, "stop", None)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(BYTES), "there is no template around it"
    assert reply.usage.completion_tokens == len(BYTES)
    assert reply.usage.total_tokens == 2 * len(BYTES)


async def test_the_async_client_gets_the_same(async_client: openai.AsyncOpenAI) -> None:
    reply = await async_client.completions.create(model="echo", prompt=["a", PROMPT], max_tokens=100)
    assert [choice.text for choice in reply.choices] == ["a", PROMPT]
    stream = await async_client.completions.create(model="echo", prompt=PROMPT, max_tokens=100, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == PROMPT


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "n": 3},
        {"prompt": [PROMPT, "b", ""], "n": 2, "prefix_strings": "x"},
        {"prompt": [[65, 66], [67]], "echo": True},
        {"prompt": PROMPT, "logprobs": 2},
        {"prompt": [PROMPT, "b"], "logprobs": 0},
        {"prompt": PROMPT, "max_tokens": 3, "echo": True},
        {"prompt": PROMPT, "choice": ["red", "Grün"]},
        {"prompt": PROMPT, "response_format": {"type": "json_object"}},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_a_streamed_answer_adds_up_to_the_whole_one(gateway: Any, fields: dict[str, Any]) -> None:
    if "" in fields["prompt"]:
        fields = fields | {"prompt": [PROMPT, "b", "c"]}
    whole = post(gateway, **fields)
    assert whole.status_code == 200, whole.text
    Completion.model_validate(whole.json(), strict=True)
    chunks = chunks_of(gateway, **fields)
    for chunk in chunks:
        # A chunk that is not the last has no reason to end yet, for which the client's type has no room.
        for choice in chunk["choices"]:
            Completion.model_validate(
                chunk | {"choices": [choice | {"finish_reason": choice["finish_reason"] or "stop"}]},
                strict=True,
            )
    assert put_together(chunks) == whole.json()["choices"]


def test_the_usage_of_a_stream_comes_last_and_only_where_it_is_wanted(gateway: Any) -> None:
    assert all("usage" not in chunk for chunk in chunks_of(gateway, prompt="abc"))
    *chunks, last = chunks_of(gateway, prompt=["abc", "de"], n=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 5, "each prompt counts once"
    assert last["usage"]["completion_tokens"] == 10


def test_without_a_limit_sixteen_tokens_are_made(gateway: Any) -> None:
    (choice,) = choices_of(gateway, prompt="x" * 40, max_tokens=None)
    assert (choice["text"], choice["finish_reason"]) == ("x" * 16, "length")


def test_a_conversation_written_out_is_read_as_one(gateway: Any) -> None:
    prompt = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of(gateway, prompt=prompt) == ["Hello!"], "control tokens in a raw prompt are recognised"


def test_an_answer_is_text_whatever_it_looks_like(gateway: Any) -> None:
    (choice,) = choices_of(gateway, model="caller", prompt="?", stop_words=["nothing"])
    assert choice["text"].startswith("<tool_call>")
    assert choice["finish_reason"] == "stop"


def test_stop_words_end_the_answer(gateway: Any) -> None:
    assert texts_of(gateway, prompt="one. two. three", stop=[" two"]) == ["one."]
    assert texts_of(gateway, prompt="one. two. three", stop_words="two", return_stop_word=True) == [
        "one. two"
    ]


def test_an_unknown_model_is_not_found(gateway: Any) -> None:
    status, param, _ = error_of(gateway, model="nobody", prompt="a")
    assert (status, param) == (404, "model")


# Several prompts


def test_answers_come_in_the_order_of_their_prompts(gateway: Any) -> None:
    prompts = [f"prompt {number}" for number in range(20)]
    choices = choices_of(gateway, prompt=prompts, n=2)
    assert [choice["index"] for choice in choices] == list(range(40))
    assert [choice["text"] for choice in choices] == [text for text in prompts for _ in range(2)]


def test_token_ids_are_the_prompt(gateway: Any) -> None:
    assert texts_of(gateway, prompt=BYTES) == [PROMPT]
    assert texts_of(gateway, prompt=[BYTES, [65]]) == [PROMPT, "A"]


def test_one_prompt_that_is_refused_refuses_all(gateway: Any) -> None:
    status, param, message = error_of(gateway, prompt=["a", "b" * 5000, "c"])
    assert (status, param) == (400, "prompt[1]")
    assert "5000 tokens" in message
    gateway.wait_for("echo", busy=0, waiting=0)


def test_one_answer_that_fails_ends_all(gateway: Any) -> None:
    with gateway.client() as http:
        answer = http.post("/v1/completions", json={"model": "broken", "prompt": ["a"] * 20})
    assert answer.status_code == 500
    gateway.wait_for("broken", busy=0, waiting=0)


@contextlib.contextmanager
def asking(gateway: Any, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request under way, on a connection that is closed in the end."""
    host, port = urlsplit(gateway.url).hostname, urlsplit(gateway.url).port
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(head.encode() + raw)
        yield connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_slots_of_all_prompts(gateway: Any, stream: bool) -> None:
    body = {"model": "slow", "prompt": ["a", "b"], "max_tokens": 2000, "stream": stream}
    with asking(gateway, body):
        gateway.wait_for("slow", busy=1, waiting=1)
    gateway.wait_for("slow", busy=0, waiting=0)
    began = time.monotonic()
    with asking(gateway, body | {"prompt": "a", "stream": True}) as connection:
        while b"text_completion" not in connection.recv(4096):
            pass
    assert time.monotonic() - began < 5, "the engine's slot is free, too"
    gateway.wait_for("slow", busy=0, waiting=0)


def test_a_request_takes_eight_slots_at_most(start_gateway: Any) -> None:
    script = {"reply": "x" * 1000, "seconds_per_token": 0.05, "slots": 32}
    gateway = start_gateway({"wide": {"script": script, "max_concurrent_requests": 32}})
    with asking(gateway, {"model": "wide", "prompt": ["a"] * 30, "max_tokens": 1000}):
        gateway.wait_for("wide", busy=8)
        time.sleep(0.2)
        assert gateway.state("wide")["busy"] == 8
    gateway.wait_for("wide", busy=0, waiting=0)


def test_a_key_pays_for_every_prompt_and_has_one_request_running(start_gateway: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    key = "key-of-the-office"
    limits = "tokens_per_minute: 6000, max_concurrent_requests: 1, requests_per_minute: 60"
    keys.write_text(f"- {{name: office, key: {key}, {limits}}}\n")
    keys.chmod(0o600)
    gateway = start_gateway({"echo": {}}, wait=False, server={"keys_file": str(keys)})
    body = {"model": "echo", "prompt": ["a" * 100] * 20, "max_tokens": 100}
    with gateway.client(headers={"Authorization": f"Bearer {key}"}) as http:
        assert http.post("/v1/completions", json=body).status_code == 200
        headers = http.post("/v1/completions", json={"model": "echo", "prompt": "a"}).headers
    spent = 6000 - int(headers["x-ratelimit-remaining-tokens"])
    assert 4000 - 600 < spent <= 4000, "some of it has come back since"
    assert int(headers["x-ratelimit-remaining-requests"]) >= 58


# Echo and log probabilities


def test_an_echoed_prompt_stands_in_front_of_each_answer(gateway: Any) -> None:
    assert texts_of(gateway, prompt=["ab", "cd"], n=2, echo=True) == ["abab", "abab", "cdcd", "cdcd"]
    assert texts_of(gateway, prompt=[257, *BYTES], echo=True) == ["<|im_end|>" + PROMPT + PROMPT]


def test_with_echo_nothing_need_be_made(gateway: Any) -> None:
    answer = post(gateway, prompt=PROMPT, echo=True, max_tokens=0).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert answer["usage"]["completion_tokens"] == 0


def test_stop_words_are_not_looked_for_in_the_echo(gateway: Any) -> None:
    assert texts_of(gateway, prompt="a.b", echo=True, stop=".") == ["a.ba"]


def test_log_probabilities_have_openais_old_form(gateway: Any) -> None:
    (choice,) = choices_of(gateway, prompt="aé", logprobs=1)
    assert choice["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [0.0, 0.0, 0.0],
        "top_logprobs": [{"a": 0.0}, {"bytes:\\xc3": 0.0}, {"bytes:\\xa9": 0.0}],
        "text_offset": [0, 1, 1],
    }


def test_an_echo_has_log_probabilities_too(gateway: Any) -> None:
    (choice,) = choices_of(gateway, prompt="abc", echo=True, logprobs=1, max_tokens=1)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "a"]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"][0] is None, "nothing foretells the first token"
    assert logprobs["top_logprobs"][0] is None
    assert all(isinstance(logprob, float) for logprob in logprobs["token_logprobs"][1:])


# What must hold


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex_pattern": "[0-9]{3}"}, "[0-9]{3}"),
        ({"choice": ["red", "green"]}, "red|green"),
        ({"prefix_strings": ["Yes", "No"]}, "(?s:(Yes|No).*)"),
        ({"regex_prefix_pattern": "[0-9]:"}, "(?s:[0-9]:.*)"),
        ({"grammar": {"syntax": "lark", "definition": 'start: "a" "b"?'}}, "ab?"),
        ({"response_format": {"type": "json_object"}}, r"(?s:\{.*\})"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_constraint_holds_and_each_answer_says_so(
    gateway: Any, fields: dict[str, Any], pattern: str
) -> None:
    answer = post(gateway, prompt="Hello", n=2, **fields)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        assert re.fullmatch(pattern, choice["text"]), choice
        assert choice["guarantee"]["complete"]
        assert choice["guarantee"]["valid"]
    assert len(json.loads(answer.headers["x-gallama-guarantee"])) == 2


def test_an_answer_can_be_explained(gateway: Any) -> None:
    (choice,) = choices_of(gateway, prompt="Hello", choice=["red"], explain=True)
    assert "".join(span["text"] for span in choice["explanation"]["spans"]) == "red"


# What is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [5, "a"]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**40]}, "prompt[0]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 200, "n": 2}, "n"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": "a", "n": 2, "best_of": 3}, "best_of"),
        ({"prompt": "a", "best_of": 0}, "best_of"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 5000}, "max_tokens"),
        ({"prompt": "a" * 5000}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [259]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "stop": [""]}, "stop[0]"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias"),
        ({"prompt": "a", "regex_pattern": "("}, "regex_pattern"),
        ({"prompt": "a", "repetition_guard": True}, "repetition_guard"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "thinking_template": "<a/>"}, "thinking_template"),
        ({"prompt": "a", "leading_prompt": "b"}, "leading_prompt"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_value_is_refused_by_name(gateway: Any, fields: dict[str, Any], param: str) -> None:
    status, refused, message = error_of(gateway, **fields)
    assert (status, refused) == (400, param), message


@pytest.mark.parametrize("fields", [{"best_of": 2, "n": 2}, {"best_of": 1}, {"user": "me"}, {"suffix": None}])
def test_what_changes_nothing_is_taken(gateway: Any, fields: dict[str, Any]) -> None:
    assert set(texts_of(gateway, prompt="a", **fields)) == {"a"}


def test_a_stream_that_is_refused_has_a_status(gateway: Any) -> None:
    assert error_of(gateway, prompt="a" * 5000, stream=True)[:2] == (400, "prompt")


def test_every_field_of_openais_is_known() -> None:
    theirs = set(completion_create_params.CompletionCreateParamsStreaming.__annotations__)
    theirs |= set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    assert theirs - set(CompletionBody.model_fields) == set()


# Its document


def test_the_document_tells_the_limits_and_fields_that_there_are() -> None:
    document = (Path(__file__).parents[2] / "docs/completions.md").read_text()
    assert f"At most {MAX_ANSWERS} answers to one request" in document
    assert f"{PROMPTS_AT_ONCE} of its prompts are worked on at a time" in document
    assert f"up to {MAX_CHOICES} answers" in document
    assert f"`max_tokens` | {CompletionBody.model_fields['max_tokens'].default} unless" in document
    for name in set(CompletionBody.model_fields) - {"model"}:
        assert f"`{name}`" in document, name
    for code in re.findall(r"```python\n(.*?)```", document, re.DOTALL):
        compile(code, "completions.md", "exec")
