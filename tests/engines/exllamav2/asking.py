"""Asking the exllamav2 engine, and what its answers must be."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema

from gallama.config import ModelSpec
from gallama.conversation import ConstraintKind
from gallama.engines import ENGINES
from gallama.generation import Engine, GenerationRequest, SamplingSettings, State
from tests.engines.asking import Answer
from tests.engines.exllamav2.ground import END_TOKENS, PAGE, Ground, Pass

GREEDY = SamplingSettings(temperature=0)
ENDLESS = SamplingSettings(temperature=0, logit_bias=dict.fromkeys(END_TOKENS, -100.0))
NOISE = SamplingSettings(temperature=1)
SLOTS = 4
POISON = (77, 78, 77, 78)
"""What prompts of texts that make trouble begin with."""
CALL_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"const": "get_weather"},
        "arguments": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Zürich", "Paris", "Hanoi"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "exact": {"type": "boolean"},
            },
            "required": ["city", "days", "exact"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}


def spec_for(folder: Path, **settings: Any) -> ModelSpec:
    settings = {"max_concurrent_requests": SLOTS, "cache_size": 16 * PAGE, **settings}
    return ModelSpec.model_validate({"model_id": str(folder), "backend": "exllamav2", **settings})


@asynccontextmanager
async def loaded(ground: Ground, folder: Path, **settings: Any) -> AsyncIterator[Engine]:
    engine = ENGINES["exllamav2"](spec_for(folder, **settings), folder)
    ground.passes.clear()  # the first token, which nobody asked for
    try:
        yield engine
    finally:
        await engine.close()


Start = Callable[[ConstraintKind, object], State]


async def generate(engine: Engine, prompt: Sequence[int], **fields: Any) -> Answer:
    fields.setdefault("max_tokens", 30)
    fields.setdefault("sampling", ENDLESS)
    async with aclosing(engine.generate(GenerationRequest(prompt_token_ids=prompt, **fields))) as chunks:
        return Answer([chunk async for chunk in chunks])


async def generate_all(engine: Engine, prompts: Sequence[Sequence[int]], **fields: Any) -> list[Answer]:
    return list(await asyncio.gather(*(generate(engine, prompt, **fields) for prompt in prompts)))


def written(engine: Engine, token_ids: Sequence[int]) -> str:
    return b"".join(engine.vocabulary.tokens[token] for token in token_ids).decode("utf-8", "replace")


def expected(ground: Ground, engine: Engine, prompts: Sequence[Sequence[int]], count: int) -> list[str]:
    return [written(engine, ground.greedy(prompt, count)) for prompt in prompts]


def make_prompts(count: int, *, longest: int = 400) -> list[list[int]]:
    """Of many lengths; some begin alike for more than a page."""
    rng = random.Random(1)
    common = [rng.randrange(3, 400) for _ in range(longest)]
    return [
        [*common[: rng.randrange(longest)], number, *common[: rng.randrange(9)]]
        for number in range(3, 3 + count)
    ]


def is_call(value: object) -> bool:
    return bool(jsonschema.Draft202012Validator(CALL_SCHEMA).is_valid(value))


def is_poisoned(text: Sequence[int]) -> bool:
    return tuple(text[: len(POISON)]) == POISON


class Pause:
    """Holds the generator in the middle of the first pass that is meant, until it may go on."""

    def __init__(self, ground: Ground, is_meant: Callable[[Pass], bool]) -> None:
        self._is_meant = is_meant
        self._reached, self._may_go_on = threading.Event(), threading.Event()
        ground.before_pass = self

    def __call__(self, one: Pass) -> None:
        if not self._reached.is_set() and self._is_meant(one):
            self._reached.set()
            assert self._may_go_on.wait(60)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 60)

    def end(self) -> None:
        self._may_go_on.set()


def raising(
    error: BaseException, is_meant: Callable[[Pass], bool], *, times: int = 1
) -> Callable[[Pass], None]:
    """A model that breaks in the first passes that are meant."""
    left = times

    def before_pass(one: Pass) -> None:
        nonlocal left
        if left and is_meant(one):
            left -= 1
            raise error

    return before_pass


def is_step(one: Pass) -> bool:
    return one.uses_cache and not one.is_prompt
