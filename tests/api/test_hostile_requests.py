"""Bodies and connections that want to hurt: each ends in a clear 4xx soon, and the next request works."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "hi"}]
SECONDS = 3.0


@pytest.fixture(autouse=True)
def the_next_request_works_and_nothing_broke(gateway: Any) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SECONDS
    assert gateway.post({"model": "echo", "messages": MESSAGES}).status_code == 200
    assert "Exception in ASGI application" not in gateway.log()


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text[:500]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert len(answer.content) < 2000
    return error


def field(name: str, value: object) -> Any:
    return pytest.param({name: value}, name, id=f"{name}={str(value)[:30]}")


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        field("n", 0),
        field("n", -1),
        field("n", 10**6),
        field("n", True),
        field("n", "1"),
        field("n", 1.5),
        field("max_tokens", 0),
        field("max_tokens", -1),
        field("max_tokens", "many"),
        field("max_completion_tokens", 0),
        field("temperature", -1),
        field("temperature", 2.1),
        field("temperature", "hot"),
        field("temperature", True),
        field("top_p", 0),
        field("top_p", 1.01),
        field("top_k", -2),
        field("top_k", 2**40),
        field("min_p", -0.1),
        field("repetition_penalty", 0),
        field("repetition_penalty", 11),
        field("frequency_penalty", 3),
        field("presence_penalty", -3),
        field("top_logprobs", 3),
        field("logit_bias", {"a": 1}),
        field("logit_bias", {"-1": 1}),
        field("logit_bias", {"9" * 30: 1}),
        field("stop", [str(i) for i in range(10_000)]),
        field("stop", 5),
        field("stream_options", {"include_usage": True}),
        field("best_of", 2),
        field("n_discard", -1),
        field("unknown", None),
        field("metadata", {"a": 1}),
        field("messages", []),
        field("messages", "hi"),
        field("model", ""),
        field("model", 7),
        field("reasoning_effort", "extreme"),
        # Not honoured yet, or not at all
        field("audio", {"voice": "a", "format": "mp3"}),
        field("explain", "yes"),
        field("function_call", "auto"),
        field("functions", []),
        field("grammar", "start: 'a'"),
        field("grammar", {"syntax": "ebnf", "definition": "start: 'a'"}),
        field("grammar", {"syntax": "lark"}),
        field("grammar", {"syntax": "lark", "definition": "start: a"}),
        field("grammar", {"syntax": "lark", "definition": "start: %json {}"}),
        field("grammar", {"syntax": "gbnf", "definition": "root ::= ("}),
        field("guided_decoding_backend", "xgrammar"),
        field("modalities", ["text", "audio"]),
        field("moderation", {}),
        field("on_unsupported", "ignore"),
        field("prediction", {"type": "content", "content": "x"}),
        field("prompt_cache_options", {}),
        field("return_thinking", "somewhere"),
        field("return_thinking", 0),
        field("service_tier", "flex"),
        field("store", True),
        field("thinking_template", "<a>"),
        field("verbosity", "low"),
        field("web_search_options", {}),
        # Constraints
        field("choice", []),
        field("choice", "a"),
        field("regex_pattern", 1),
        field("prefix_strings", []),
        # Tools
        field("tools", {}),
        field("tool_choice", "required"),
        field("tool_choice", "sometimes"),
    ],
)
def test_a_wrong_field_is_named(gateway: Any, fields: dict[str, Any], param: str) -> None:
    error = refused(gateway.post({"model": "echo", "messages": MESSAGES, **fields}))
    assert error["param"].split(".")[0].split("[")[0] == param
    assert param in error["message"] or error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
        ({"logit_bias": {"7": 10**9}}, "logit_bias.7"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x" * 10**6]}, "stop[0]"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [[["x"]]]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]},
            "messages[0].content[0].b",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}
                ]
            },
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": None, "type": "function"}]}]},
            "messages[0].tool_calls[0].id",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "type": "custom", "custom": {}}]}
                ]
            },
            "messages[0].tool_calls[0].type",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}] * 2,
                    }
                ]
            },
            "messages[0].tool_calls[1].id",
        ),
        ({"tools": [tool(), tool()]}, "tools[1].function.name"),
        ({"tools": [tool(f"f{number}") for number in range(600)]}, "tools"),
        ({"tools": [tool("two words")]}, "tools[0].function.name"),
        ({"tools": [tool('"')]}, "tools[0].function.name"),
        ({"tools": [tool("</tool_call>")]}, "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("f\n")]}, "tools[0].function.name"),
        ({"tools": [tool(parameters="object")]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        (
            {"tools": [tool()], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tool_choice.allowed_tools",
        ),
        (
            {
                "tools": [tool()],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "g"}}],
                    },
                },
            },
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {}},
                    "x": 1,
                }
            },
            "response_format.x",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"choice": ["a"], "regex_pattern": "b"}, "regex_pattern"),
        ({"choice": ["a"], "response_format": {"type": "json_object"}}, "response_format"),
        ({"choice": ["a"], "tools": [tool()], "tool_choice": "required"}, "choice"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_value_inside_a_field_is_named_by_its_path(
    gateway: Any, fields: dict[str, Any], param: str
) -> None:
    error = refused(gateway.post({"model": "echo", "messages": MESSAGES, **fields}))
    assert error["param"] == param


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": "\xc3\x28"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 500 + b"]" * 500,
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e400}',
        b'{"seed": 18446744073709551616}',
        b'{"seed": ' + b"9" * 1_000_000 + b"}",
        b'{"model": "a", "model": "b"}',
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        b'{"model": "\\ud800"}',
        b'{"\\udfff": 1}',
        b"{'model': 'a'}",
        b'{"model": "a",}',
    ],
    ids=lambda raw: ascii(raw[:30]),
)
def test_a_body_that_is_not_strict_json_is_refused(gateway: Any, raw: bytes) -> None:
    with gateway.client() as client:
        headers = {"content-type": "application/json"}
        error = refused(client.post("/v1/chat/completions", content=raw, headers=headers))
    assert error["param"] is None


def test_what_json_allows_is_taken(gateway: Any) -> None:
    raw = b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud83d\\ude00 \\u0000 \\/"}]}'
    with gateway.client() as client:
        answer = client.post(
            "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
        )
    assert answer.json()["choices"][0]["message"]["content"] == "😀 \0 /"


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_another_content_type_is_refused(gateway: Any, content_type: str) -> None:
    with gateway.client() as client:
        headers = {"content-type": content_type}
        refused(client.post("/v1/chat/completions", content=b"{}", headers=headers))


def test_a_compressed_body_is_refused_unread(gateway: Any) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    with gateway.client() as client:
        error = refused(client.post("/v1/chat/completions", content=bomb, headers=headers))
    assert "gzip" in error["message"]


def test_a_body_beyond_the_limit_is_a_413(gateway: Any) -> None:
    chunks = (b" " * 2**20 for _ in range(33))
    with gateway.client() as client:
        headers = {"content-type": "application/json"}
        error = refused(client.post("/v1/chat/completions", content=chunks, headers=headers), 413)
    assert error["code"] == "request_too_large"


def test_a_body_that_announces_too_much_is_a_413_at_once(gateway: Any) -> None:
    answer = speak(
        gateway,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{",
    )
    assert answer.startswith(b"HTTP/1.1 413 ")


def speak(gateway: Any, raw: bytes) -> bytes:
    """The first part of the answer to something that no HTTP client would say."""
    place = urlsplit(gateway.url)
    with socket.create_connection((place.hostname, place.port), timeout=2) as connection:
        connection.sendall(raw)
        return connection.recv(65536)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Big: " + b"a" * 2**20 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET http://localhost/../v1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET //v1/../health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%2e%2e/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\n{}\r\n0\r\nX-Trailer: " + b"a" * 2**20,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2;" + b"a" * 2**20,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    ],
    ids=lambda head: ascii(head[:50]),
)
def test_a_hostile_head_is_a_4xx(gateway: Any, head: bytes) -> None:
    try:
        answer = speak(gateway, head)
    except ConnectionResetError:
        return  # it would not read all of it
    assert answer.startswith(b"HTTP/1.1 4"), answer[:200]


def test_ten_thousand_parts_are_one_text(gateway: Any) -> None:
    parts = [{"type": "text", "text": ""}] * 4000
    answer = gateway.post(
        {"model": "echo", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    )
    assert answer.status_code in (200, 400)


def test_messages_stay_short_whatever_they_quote(gateway: Any) -> None:
    long = "x" * 100_000
    bodies: list[dict[str, Any]] = [
        {long: 1},
        {"messages": [{"role": "user", "content": [{"type": long}]}]},
        {"tools": [{"type": long}]},
        {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": long}}},
        {"logit_bias": {long: 1}},
        {"service_tier": long},
        {"model": long},
    ]
    for body in bodies:
        refused(gateway.post({"model": "echo", "messages": MESSAGES, **body}))


def test_a_deep_schema_is_refused(gateway: Any) -> None:
    schema: dict[str, Any] = {}
    for _ in range(150):
        schema = {"type": "array", "items": schema}
    raw = json.dumps({"model": "echo", "messages": MESSAGES, "tools": [tool(parameters=schema)]}).encode()
    with gateway.client() as client:
        headers = {"content-type": "application/json"}
        refused(client.post("/v1/chat/completions", content=raw, headers=headers))


def test_a_client_that_offers_http_2_is_answered(gateway: Any) -> None:
    headers = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABk"}
    answer = gateway.post({"model": "echo", "messages": MESSAGES}, headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [1] * 1_000_000}, "messages[0]"),
        ({"metadata": {str(number): 1 for number in range(200_000)}}, "metadata.0"),
        ({f"field_{number}": 1 for number in range(200_000)}, "field_0"),
    ],
    ids=["messages", "metadata", "unknown fields"],
)
def test_a_million_problems_cost_no_more_than_one(gateway: Any, fields: dict[str, Any], param: str) -> None:
    answer = gateway.post({"model": "echo", "messages": MESSAGES, **fields})
    assert refused(answer)["param"] == param


def test_a_list_of_a_million_numbers_does_not_stop_others(gateway: Any) -> None:
    answer = gateway.post({"model": "echo", "messages": MESSAGES, "prompt": list(range(1_000_000))})
    assert refused(answer)["param"] == "prompt"
