"""Two hundred requests of all kinds side by side: every answer that is complete is valid.

Over HTTP with the real model at temperature 1.2; and in this process with noise instead of a model, which
shows that what holds is held by the constraints and not by what a model has learned. Whether an answer is
valid is judged by other means than those that made it: `jsonschema`, `re`, an XML parser, plain code.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.api.openai_chat_reply import ReplyHead, to_chunks, to_completion
from gallama.api.openai_chat_request import ChatCompletionBody, to_chat_request
from gallama.catalog import resolve_model
from gallama.config import ModelSpec, ServerConfig
from gallama.conversation import collect_reply
from gallama.engines import ENGINES
from gallama.errors import GallamaError
from gallama.generation import Engine
from gallama.worker.chat import ChatRunner

MODEL = "smollm2-135m"
AT_ONCE = 8
MAX_TOKENS = 160
STOP_WORD = "e"
TEMPLATE = "<plan><goal>{goal:text(5)}</goal><pace>{slow|quick}</pace></plan>"
BLOCK = r"<plan><goal>[^<&]*[^<&\s][^<&]*</goal><pace>(slow|quick)</pace></plan>"

# What is asked


def schema_of(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def tool(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def json_format(schema: dict[str, Any], *, strict: bool = False) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": strict}}


SHORT = {"type": "string", "maxLength": 10}
COLORS = {"enum": ["red", "green", "blue"]}
PERSON = schema_of(
    name={"type": "string", "minLength": 1, "maxLength": 12},
    age={"type": "integer", "minimum": 0, "maximum": 150},
    pets={"type": "array", "maxItems": 2, "items": schema_of(kind={"enum": ["cat", "dog"]}, name=SHORT)},
)
EVENT = schema_of(
    day={"type": "string", "format": "date"},
    code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
    place={"anyOf": [{"const": None}, SHORT]},
)
UNIQUE = schema_of(tags={"type": "array", "items": COLORS, "maxItems": 3, "uniqueItems": True})
NOT_RED = schema_of(color={**COLORS, "not": {"const": "red"}}, name=SHORT)
ONLY_RED_IS_WARM = {
    **schema_of(color=COLORS, warm={"type": "boolean"}),
    "if": {"properties": {"color": {"const": "red"}}},
    "then": {"properties": {"warm": {"const": True}}},
    "else": {"properties": {"warm": {"const": False}}},
}
PAINT = schema_of(color=COLORS, name=SHORT)
WASH = schema_of(warm={"type": "boolean"})
TOOLS = {"tools": [tool("paint", PAINT), tool("wash", WASH)]}
TOOL_SCHEMAS = {"paint": PAINT, "wash": WASH, "sort": UNIQUE}

LARK = 'start: "(" start ")" | WORD\nWORD: /[a-z]{1,6}/'
GBNF = 'root ::= hello (" and " hello){0,2} "!"\nhello ::= ("hi" | "hello") " " [A-Z] [a-z]{1,5}\n'
GREETING = r"(hi|hello) [A-Z][a-z]{1,5}"


# Who judges


@dataclass
class Answer:
    """One choice of a completion, as a client has read it."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    logprob_bytes: list[int] = field(default_factory=list)
    finish_reason: str = ""
    guarantee: dict[str, Any] = field(default_factory=dict)

    def add(self, choice: dict[str, Any]) -> None:
        """Take a whole choice, or one of a chunk."""
        message = choice.get("message") or choice["delta"]
        self.content += message.get("content") or ""
        self.thinking += message.get("reasoning_content") or ""
        for position, call in enumerate(message.get("tool_calls") or ()):
            if "id" in call:
                self.calls.append({"name": call["function"]["name"], "arguments": ""})
            self.calls[call.get("index", position)]["arguments"] += call["function"]["arguments"]
        for entry in (choice["logprobs"] or {"content": ()})["content"]:
            self.logprob_bytes += entry["bytes"]
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.guarantee = choice.get("guarantee", self.guarantee)


Judge = Callable[[Answer], None]


def fits(schema: dict[str, Any]) -> Judge:
    def judge(answer: Answer) -> None:
        check_instance(answer.content, schema)

    return judge


def check_instance(text: str, schema: dict[str, Any]) -> None:
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=formats).validate(json.loads(text))


def matches(pattern: str) -> Judge:
    def judge(answer: Answer) -> None:
        assert re.fullmatch(pattern, answer.content, re.DOTALL)

    return judge


def is_word_in_brackets(answer: Answer) -> None:
    depth = len(answer.content) - len(answer.content.lstrip("("))
    end = len(answer.content) - depth
    assert re.fullmatch("[a-z]{1,6}", answer.content[depth:end])
    assert answer.content[end:] == ")" * depth


def calls(*, at_least: int = 0, else_text: Judge | None = None) -> Judge:
    """Calls that fit, or if there is none, maybe a text that does."""

    def judge(answer: Answer) -> None:
        assert len(answer.calls) >= at_least
        assert (answer.finish_reason == "tool_calls") == bool(answer.calls)
        for call in answer.calls:
            check_instance(call["arguments"], TOOL_SCHEMAS[call["name"]])
        if else_text is not None and not answer.calls:
            else_text(answer)
        if else_text is not None and answer.calls:
            assert answer.content == ""

    return judge


@dataclass(frozen=True)
class Kind:
    name: str
    guarantee: str
    """The kind that the answer's guarantee must name."""
    body: dict[str, Any]
    judge: Judge
    is_validated: bool = False
    """Whether the grammar leaves a part of it to be checked."""


KINDS = [
    Kind(
        "any object",
        "json_object",
        {"response_format": {"type": "json_object"}},
        lambda answer: check_instance(answer.content, {"type": "object"}),
    ),
    Kind("a schema", "json_schema", {"response_format": json_format(PERSON)}, fits(PERSON)),
    Kind("a strict schema", "json_schema", {"response_format": json_format(EVENT, strict=True)}, fits(EVENT)),
    Kind("uniqueItems", "json_schema", {"response_format": json_format(UNIQUE)}, fits(UNIQUE), True),
    Kind("not", "json_schema", {"response_format": json_format(NOT_RED)}, fits(NOT_RED), True),
    Kind(
        "if",
        "json_schema",
        {"response_format": json_format(ONLY_RED_IS_WARM)},
        fits(ONLY_RED_IS_WARM),
        True,
    ),
    Kind("a regex", "regex", {"regex_pattern": r"^\d{3}-[a-z]{2,5}$"}, matches(r"\d{3}-[a-z]{2,5}")),
    Kind("a prefix's regex", "regex_prefix", {"regex_prefix_pattern": "(Yes|No), "}, matches("(Yes|No), .*")),
    Kind("prefixes", "prefix", {"prefix_strings": ["Dear Sir", "Hey"]}, matches("(Dear Sir|Hey).*")),
    Kind("a choice", "choice", {"choice": ["red", "red wine", "blåbær"]}, matches("red|red wine|blåbær")),
    Kind(
        "two conditions",
        "regex",
        {"regex_pattern": "[a-z ]{4,12}", "prefix_strings": ["a ", "the "]},
        matches("(?=a |the )[a-z ]{4,12}"),
    ),
    Kind("lark", "grammar", {"grammar": {"syntax": "lark", "definition": LARK}}, is_word_in_brackets),
    Kind(
        "gbnf",
        "grammar",
        {"grammar": {"syntax": "gbnf", "definition": GBNF}},
        matches(f"{GREETING}( and {GREETING}){{0,2}}!"),
    ),
    Kind("tools", "tools", TOOLS, calls()),
    Kind("demanded tools", "tools", {**TOOLS, "tool_choice": "required"}, calls(at_least=1)),
    Kind(
        "one demanded tool",
        "tools",
        {
            **TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "wash"}},
            "parallel_tool_calls": False,
            # With a demanded call it is for later answers.
            "response_format": json_format(PERSON),
        },
        calls(at_least=1),
    ),
    Kind(
        "tools or a schema",
        "tools",
        {**TOOLS, "response_format": json_format(PERSON)},
        calls(else_text=fits(PERSON)),
    ),
    Kind(
        "tools or a regex",
        "tools",
        {**TOOLS, "regex_pattern": "[a-z]{3,9}"},
        calls(else_text=matches("[a-z]{3,9}")),
    ),
    Kind(
        "tools with uniqueItems",
        "tools",
        {"tools": [tool("sort", UNIQUE)], "tool_choice": "required", "parallel_tool_calls": False},
        calls(at_least=1),
        True,
    ),
    Kind(
        "tools or a validated schema",
        "tools",
        {**TOOLS, "response_format": json_format(UNIQUE), "parallel_tool_calls": False},
        calls(else_text=fits(UNIQUE)),
        True,
    ),
]
# What stands beside each kind, half of it streamed.
ROUNDS: list[dict[str, Any]] = [
    {},
    {"stream": True},
    {"logprobs": True, "top_logprobs": 2},
    {"stream": True, "thinking_template": TEMPLATE},
    {"thinking_template": TEMPLATE, "repetition_guard": True},
    {"stream": True, "logprobs": True, "repetition_guard": True},
    {"n": 2, "stop": [STOP_WORD]},
    {"stream": True, "n": 2, "thinking_template": TEMPLATE},
    {"thinking_template": TEMPLATE, "stop": STOP_WORD, "logprobs": True},
    {"stream": True, "stop": [STOP_WORD], "return_stop_word": True},
]


@dataclass(frozen=True)
class Asked:
    kind: Kind
    beside: dict[str, Any]

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Tell me about Tom."}],
            "temperature": 1.2,
            "max_tokens": MAX_TOKENS,
            **self.kind.body,
            **self.beside,
        }


def request_of(kind: Kind, beside: dict[str, Any]) -> Asked:
    """Without `repetition_guard` where nothing has strings that it could close: there it is refused."""
    has_strings = "thinking_template" in beside or kind.guarantee in ("json_object", "json_schema", "tools")
    names = beside if has_strings else beside.keys() - {"repetition_guard"}
    return Asked(kind, {name: beside[name] for name in names})


# Kinds change slowest: those of a kind share their prompts' beginnings, as far as they have one.
REQUESTS = [request_of(kind, beside) for kind in KINDS for beside in ROUNDS]


@dataclass(frozen=True)
class Answered:
    """How a request ended."""

    answers: list[Answer]
    error_code: str | None = None


def judge_all(results: list[Answered]) -> Counter[str]:
    """Judge the answers to all requests; returns how many ended how."""
    ends: Counter[str] = Counter()
    for asked, result in zip(REQUESTS, results, strict=True):
        try:
            ends += judge_request(asked, result)
        except (AssertionError, ValueError, jsonschema.ValidationError, ElementTree.ParseError) as error:
            error.add_note(f"{asked.kind.name} beside {asked.beside}:\n{result}")
            raise
    return ends


def judge_request(asked: Asked, result: Answered) -> Counter[str]:
    if result.error_code is not None:
        assert (result.error_code, asked.kind.is_validated) == ("constraint_failed", True)
        return Counter(constraint_failed=1)
    assert len(result.answers) == asked.beside.get("n", 1)
    for answer in result.answers:
        judge_answer(asked, answer)
    return Counter(
        "complete" if answer.guarantee["complete"] else answer.finish_reason for answer in result.answers
    )


def judge_answer(asked: Asked, answer: Answer) -> None:
    thinks = "thinking_template" in asked.beside
    guarantee = answer.guarantee
    assert guarantee["kind"] == asked.kind.guarantee
    assert ("template" in guarantee["beside"]) == thinks
    assert guarantee["valid"]
    assert (guarantee["by"] == "grammar+validation") == bool(guarantee["validated_keywords"])
    assert bool(guarantee["validated_keywords"]) == asked.kind.is_validated
    if thinks:
        assert re.fullmatch(BLOCK, answer.thinking)
        ElementTree.fromstring(answer.thinking)
    else:
        assert answer.thinking == ""
    if "logprobs" in asked.beside:
        tokens = bytes(answer.logprob_bytes).decode(errors="replace")
        # A stop word or a limit may cut inside of a token, which then still counts.
        assert tokens == answer.content if guarantee["complete"] else tokens.startswith(answer.content)
    if "stop" in asked.beside:
        shown = asked.beside.get("return_stop_word", False)
        assert STOP_WORD not in (answer.content.removesuffix(STOP_WORD) if shown else answer.content)
    if guarantee["complete"]:
        assert answer.finish_reason in ("stop", "tool_calls")
        asked.kind.judge(answer)
    elif answer.finish_reason != "length":
        assert "stop" in asked.beside, "nothing but a limit or a stop word cuts an answer"
        assert answer.finish_reason == "stop"
    elif guarantee["attempts"] == 1:
        assert guarantee["sampled_tokens"] + guarantee["forced_tokens"] == MAX_TOKENS


async def read_chunks(chunks: AsyncIterable[dict[str, Any]], number: int) -> Answered:
    answers = [Answer() for _ in range(number)]
    async for chunk in chunks:
        if "error" in chunk:
            return Answered([], chunk["error"]["code"])
        for choice in chunk["choices"]:
            answers[choice["index"]].add(choice)
    return Answered(answers)


def read_completion(completion: dict[str, Any]) -> Answered:
    answers = [Answer() for _ in completion["choices"]]
    for choice in completion["choices"]:
        answers[choice["index"]].add(choice)
    return Answered(answers)


async def ask_all(ask: Callable[[Asked], Any]) -> list[Answered]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(asked: Asked) -> Answered:
        async with gate:
            answered: Answered = await ask(asked)
            return answered

    return list(await asyncio.gather(*map(one, REQUESTS)))


# Over HTTP


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, serving_gateway: Callable[..., Any]) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("mixed")
    with serving_gateway(folder, settings="max_seq_len=2048 cache_size=4096") as gateway:
        yield f"{gateway.url}/v1/chat/completions"


async def events_of(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


async def test_every_complete_answer_over_http_is_valid(url: str) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=300) as client:

        async def ask(asked: Asked) -> Answered:
            async with client.stream("POST", url, json=asked.body) as response:
                if "stream" in asked.beside and response.status_code == 200:
                    return await read_chunks(events_of(response), asked.beside.get("n", 1))
                answer = json.loads(await response.aread())
            return Answered([], answer["error"]["code"]) if "error" in answer else read_completion(answer)

        ends = judge_all(await ask_all(ask))
    assert len(REQUESTS) == 200
    assert ends["constraint_failed"] <= 6, ends
    assert ends["complete"] >= 130, ends


# With noise instead of a model


class NoiseKv:
    """Stands for llama.cpp's context: remembers nothing, and finds each token as good as any other."""

    cells = 2**20
    shares_cells = True

    def __init__(self, vocabulary_size: int) -> None:
        self._rows = np.random.default_rng(0).standard_normal((64, vocabulary_size), dtype=np.float32)
        self._next = 0

    def decode(self, *batch: NDArray[Any]) -> None:
        pass

    def logits(self, batch_index: int) -> NDArray[np.float32]:
        self._next = (self._next + 1) % len(self._rows)
        row: NDArray[np.float32] = self._rows[self._next]
        return row

    def forget(self, sequence: int, from_position: int) -> None:
        pass

    def copy(self, source: int, target: int, length: int) -> None:
        pass

    def save(self, sequence: int) -> NDArray[np.uint8]:
        return np.zeros(0, dtype=np.uint8)

    def restore(self, sequence: int, snapshot: NDArray[np.uint8]) -> None:
        pass

    def clear(self, *, zero: bool = True) -> None:
        pass


@pytest.fixture
async def noise() -> AsyncGenerator[Engine, None]:
    """The real engine, its scheduler, its vocabulary, its samplers; only the model in it is none."""
    model = resolve_model({"model_id": MODEL, "max_seq_len": 2048}, ServerConfig())
    engine: Any = ENGINES["llama_cpp"](model.spec, model.path)
    engine._scheduler._cache._kv = NoiseKv(len(engine.vocabulary.tokens))
    yield engine
    await engine.close()


async def test_every_complete_answer_out_of_noise_is_valid(noise: Engine) -> None:
    runner = ChatRunner(noise, ModelSpec(model_id=MODEL))
    head = ReplyHead(id="chatcmpl-1", model=MODEL, fingerprint="f", wants_logprobs=True)

    async def ask(asked: Asked) -> Answered:
        body = ChatCompletionBody.model_validate(asked.body)
        events = runner.run(to_chat_request(body, request_id="r", model=MODEL))
        try:
            if "stream" in asked.beside:
                chunks = to_chunks(events, head, include_usage=False)
                return await read_chunks(chunks, asked.beside.get("n", 1))
            async with aclosing(events):
                return read_completion(to_completion(await collect_reply(events), head))
        except GallamaError as error:
            return Answered([], error.specific_code)

    ends = judge_all(await ask_all(ask))
    assert ends["constraint_failed"] <= 8, ends
    assert ends["complete"] >= 100, ends
