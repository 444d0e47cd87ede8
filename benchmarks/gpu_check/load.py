"""Constrained texts for an engine to write, many at once, and whether each is what was asked for."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

from gallama.constraints import AnswerSpec, Compiled, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint, ConstraintKind
from gallama.errors import GallamaError
from gallama.generation import Engine, GeneratedChunk, GenerationRequest, SamplingSettings, State

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "occupation": {"enum": ["baker", "doctor", "farmer", "sailor"]},
        "is_employed": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "age", "occupation", "is_employed", "tags"],
    "additionalProperties": False,
}
PATTERNS = (r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]", "[à-ü]{3,9} [一-龥]{3}😀?")
MOST_TOKENS = 400
_ENDLESS = "[a-z ]{8000}"

Judge = Callable[[str], bool]


@dataclass(frozen=True)
class Work:
    """A grammar, and what tells whether a text follows it."""

    kind: ConstraintKind
    source: Any
    is_right: Judge


@dataclass(frozen=True)
class Written:
    text: str
    tokens: int
    forced_tokens: int
    end: str | None


def works() -> list[Work]:
    person = jsonschema_rs.validator_for(PERSON)

    def is_person(text: str) -> bool:
        return bool(person.is_valid(json.loads(text)))

    def is_match(pattern: str) -> Judge:
        return lambda text: re.fullmatch(pattern, text) is not None

    schema = Work("json_schema", PERSON, is_person)
    return [schema, *(Work("regex", pattern, is_match(pattern)) for pattern in PATTERNS)]


def compile_work(backend: LLGuidanceBackend, kind: ConstraintKind, source: Any) -> Compiled:
    body = admit_constraints([Constraint(kind=kind, source=source)], None)
    return backend.compile(AnswerSpec(body=body))


def request_for(
    engine: Engine, prompt: str, *, max_tokens: int, state: State | None = None, temperature: float = 1
) -> GenerationRequest:
    return GenerationRequest(
        prompt_token_ids=engine.tokenize(prompt),
        max_tokens=max_tokens,
        state=state,
        sampling=SamplingSettings(temperature=temperature),
    )


async def write(engine: Engine, request: GenerationRequest) -> Written:
    async with aclosing(engine.generate(request)) as chunks:
        written = [chunk async for chunk in chunks]
    return Written(
        text="".join(chunk.text for chunk in written),
        tokens=sum(chunk.sampled_tokens + chunk.forced_tokens for chunk in written),
        forced_tokens=sum(chunk.forced_tokens for chunk in written),
        end=written[-1].end,
    )


async def write_all(engine: Engine, backend: LLGuidanceBackend, count: int) -> list[str]:
    """So many constrained texts at once; what is wrong with them, each in a line."""
    kinds = works()
    grammars = [compile_work(backend, work.kind, work.source) for work in kinds]
    requests = [
        request_for(
            engine,
            f"This is request {number}. " * (1 + number % 7),
            max_tokens=MOST_TOKENS,
            state=grammars[number % len(kinds)].start(),
            temperature=(0, 0.7, 1, 2)[number % 4],
        )
        for number in range(count)
    ]
    answers = await asyncio.gather(*(write(engine, each) for each in requests), return_exceptions=True)
    return [
        f"request {number}, {kinds[number % len(kinds)].kind}: {problem}"
        for number, answer in enumerate(answers)
        if (problem := problem_with(kinds[number % len(kinds)], answer))
    ]


def problem_with(work: Work, answer: Written | BaseException) -> str | None:
    if isinstance(answer, BaseException):
        return f"{type(answer).__name__}: {str(answer)[:200]}"
    if answer.end != "stop":
        return f"ended by {answer.end} after {answer.tokens} tokens: {answer.text[-80:]!r}"
    try:
        is_right = work.is_right(answer.text)
    except ValueError as error:
        return f"{error}: {answer.text[:200]!r}"
    return None if is_right else f"does not follow the grammar: {answer.text[:200]!r}"


class UnderWay:
    """Answers that would go on for long, each of which has begun."""

    def __init__(self, engine: Engine, backend: LLGuidanceBackend) -> None:
        self._engine = engine
        self._grammar = compile_work(backend, "regex", _ENDLESS)
        self.streams: list[AsyncGenerator[GeneratedChunk, None]] = []

    async def begin(self, count: int, *, max_tokens: int) -> None:
        for number in range(count):
            request = request_for(
                self._engine, f"Text {number}. ", max_tokens=max_tokens, state=self._grammar.start()
            )
            self.streams.append(self._engine.generate(request))
        await asyncio.gather(*(_until_text(stream) for stream in self.streams))

    async def cancel(self, streams: Sequence[AsyncGenerator[GeneratedChunk, None]]) -> None:
        await asyncio.gather(*(stream.aclose() for stream in streams))
        self.streams = [stream for stream in self.streams if stream not in streams]


async def _until_text(stream: AsyncGenerator[GeneratedChunk, None]) -> None:
    async for chunk in stream:
        if chunk.sampled_tokens or chunk.forced_tokens:
            return


async def until_busy_with(engine: Engine, slots: int, seconds: float = 30) -> None:
    """
    Raises:
        TimeoutError: it is busy with others.
    """
    async with asyncio.timeout(seconds):
        while engine.status().busy_slots != slots:  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.0005)


async def until_written(engine: Engine, tokens: int, seconds: float = 30) -> None:
    """
    Args:
        tokens: that the engine has written since it was loaded, as `tokens_of` counts them.

    Raises:
        TimeoutError: it writes too slowly.
    """
    async with asyncio.timeout(seconds):
        while tokens_of(engine) < tokens:  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.0005)


def tokens_of(engine: Engine) -> int:
    """Sampled and forced, since the engine was loaded."""
    status = engine.status()
    return status.sampled_tokens + status.forced_tokens


async def can_compute(engine: Engine) -> bool:
    try:
        await engine.probe()
    except GallamaError as error:
        print(f"the probe says: {error}", flush=True)
        return False
    return True
