"""The work of the benchmarks, and a client that does little else than to look at the clock.

Every kind of work is a chat request by number: the same number is the same request, on each server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import httpx
import jsonschema_rs

Body = dict[str, Any]
Json = Mapping[str, Any]

PERSON_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "occupation": {"enum": ["engineer", "teacher", "doctor", "artist"]},
        "address": {
            "type": "object",
            "properties": {
                "street_name": {"type": "string", "maxLength": 24},
                "city": {"type": "string", "maxLength": 20},
                "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"},
                "country_code": {"enum": ["US", "GB", "FR", "DE"]},
            },
            "required": ["street_name", "city", "postal_code", "country_code"],
            "additionalProperties": False,
        },
        "is_employed": {"type": "boolean"},
        "skills": {
            "type": "array",
            "items": {"enum": ["python", "rust", "cooking", "painting"]},
            "minItems": 2,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "occupation", "address", "is_employed", "skills"],
    "additionalProperties": False,
}
WEATHER_ARGUMENTS: Json = {
    "type": "object",
    "properties": {
        "location": {"type": "string", "description": "The city and state", "maxLength": 24},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["location", "unit"],
    "additionalProperties": False,
}
WEATHER_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": WEATHER_ARGUMENTS,
    },
}
WEATHER_CALL: Json = {
    "type": "object",
    "properties": {"name": {"const": "get_current_weather"}, "arguments": WEATHER_ARGUMENTS},
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
THINKING_TEMPLATE = """
<plan>
  <problem>{what is asked:text(24)}</problem>
  <steps>
    <step>{the first thing to do:text(24)}</step>
    <step>{the next one:text(24)}</step>
  </steps>
  <difficulty>{easy|medium|hard}</difficulty>
</plan>
"""
BACKGROUND = "Background. " + "The llama lives in the mountains and eats grass. " * 120
FREE_TOKENS = 160

_client_seconds = httpx.Timeout(600)


def free_request(model: str, number: int) -> Body:
    return chat(model, f"Write a long story about llama number {number}.", FREE_TOKENS)


def json_request(model: str, number: int) -> Body:
    return chat(model, f"Describe person number {number} as JSON.", 512) | answer_in("person", PERSON_SCHEMA)


def tool_request(model: str, number: int) -> Body:
    prompt = f"What is the weather like in Boston today? Ask {number}."
    return chat(model, prompt, 256) | {"tools": [WEATHER_TOOL], "tool_choice": "required"}


def tool_request_by_schema(model: str, number: int) -> Body:
    """The same call for a server that lets a model write prose before it, even where a call is required."""
    return tool_request(model, number) | {"tool_choice": "auto"} | answer_in("call", WEATHER_CALL)


def answer_in(name: str, schema: Json) -> Body:
    json_schema = {"name": name, "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def thinking_request(model: str, number: int) -> Body:
    prompt = f"I had {number + 10} apples and gave away 4. How many have I?"
    return chat(model, prompt, 200) | {"thinking_template": THINKING_TEMPLATE}


def prefix_request(model: str, number: int) -> Body:
    return chat(model, f"{BACKGROUND}Question {number}: what does it eat?", 16)


REQUESTS: Mapping[str, Callable[[str, int], Body]] = {
    "free": free_request,
    "json": json_request,
    "tool": tool_request,
    "thinking": thinking_request,
    "prefix": prefix_request,
}
PEER_REQUESTS = {**REQUESTS, "tool": tool_request_by_schema}
"""The same work, as llama-server is asked for it."""


def chat(model: str, prompt: str, max_tokens: int) -> Body:
    """A streamed request that is the same work each time: greedy, with the tokens counted at the end."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client saw of one streamed answer."""

    seconds: float
    first_piece_seconds: float
    """From the request to the first piece of text."""
    last_piece_seconds: float
    first_piece: str
    """That text: a run which a grammar forced comes as one piece."""
    completion_tokens: int
    guessed_right: int = 0
    """Tokens of the answer that were guessed ahead."""
    guessed_wrong: int = 0
    content: str = ""
    thinking: str = ""
    arguments: str = ""
    """Of the tool calls."""


def is_valid(kind: str, answer: Answer) -> bool:
    """Whether the answer has the form that its kind of work asks for."""
    match kind:
        case "json":
            return fits(PERSON_SCHEMA, answer.content)
        case "tool":
            return fits(WEATHER_ARGUMENTS, answer.arguments) or fits(WEATHER_CALL, answer.content)
        case "thinking":
            return is_xml(answer.thinking)
        case _:
            return bool(answer.content)


def fits(schema: Json, text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return jsonschema_rs.is_valid(dict(schema), value)


def is_xml(text: str) -> bool:
    try:
        ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return False
    return True


def new_client() -> httpx.AsyncClient:
    """A client with a connection for each request: a server may close one that waits for its next turn."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=_client_seconds, limits=limits, trust_env=False)


async def ask(client: httpx.AsyncClient, base_url: str, body: Body) -> Answer:
    """
    Raises:
        RuntimeError: the server refused the request.
    """
    began = time.perf_counter()
    async with client.stream("POST", f"{base_url}/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{base_url}: {response.status_code} {(await response.aread())[:500]!r}")
        lines = [(time.perf_counter() - began, line) async for line in response.aiter_lines()]
    # What the pieces say is read when the answer is over: until then the servers need the processor.
    return read_answer(time.perf_counter() - began, lines)


def read_answer(seconds: float, lines: Sequence[tuple[float, str]]) -> Answer:
    """
    Args:
        lines: each line of the stream, and when it came, in seconds.
    """
    usage: Json = {}
    pieces = []
    texts = {"content": "", "thinking": "", "arguments": ""}
    for moment, line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(f"the answer ended in an error: {chunk['error']}")
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            parts = _texts(choice["delta"])
            for name, text in parts.items():
                texts[name] += text
            if any(parts.values()):
                pieces.append((moment, "".join(parts.values())))
    details = usage.get("completion_tokens_details") or {}
    (first_moment, first_piece), (last_moment, _) = pieces[0], pieces[-1]
    return Answer(
        seconds=seconds,
        first_piece_seconds=first_moment,
        last_piece_seconds=last_moment,
        first_piece=first_piece,
        completion_tokens=usage["completion_tokens"],
        guessed_right=details.get("accepted_prediction_tokens", 0),
        guessed_wrong=details.get("rejected_prediction_tokens", 0),
        **texts,
    )


def _texts(delta: Json) -> dict[str, str]:
    calls = delta.get("tool_calls") or ()
    return {
        "content": delta.get("content") or "",
        "thinking": delta.get("thinking") or "",
        "arguments": "".join(call["function"].get("arguments") or "" for call in calls),
    }


async def ask_all(
    client: httpx.AsyncClient, base_url: str, bodies: Sequence[Body], at_once: int
) -> tuple[float, list[Answer]]:
    """Ask for all, with so many at work at a time; returns the seconds for all, and the answers in order."""
    room = asyncio.Semaphore(at_once)

    async def ask_one(body: Body) -> Answer:
        async with room:
            return await ask(client, base_url, body)

    began = time.perf_counter()
    answers = await asyncio.gather(*(ask_one(body) for body in bodies))
    return time.perf_counter() - began, answers
