"""Asking an engine, and what it should say by what the model says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint, ConstraintKind
from gallama.generation import (
    Engine,
    GenerationRequest,
    SamplingSettings,
    State,
    Vocabulary,
)
from tests.engines.asking import Answer
from tests.engines.exllamav3.ground import Ground

GREEDY = SamplingSettings(temperature=0)
# Ends only where a limit is: the end tokens are 0 and 2.
ENDLESS = SamplingSettings(temperature=0, logit_bias={0: -1000, 2: -1000})


def start_state(backend: LLGuidanceBackend, kind: ConstraintKind, source: object) -> State:
    body = admit_constraints([Constraint(kind=kind, source=source)], None)
    return backend.compile(AnswerSpec(body=body)).start()


def request_for(engine: Engine, prompt: str | Sequence[int], **fields: Any) -> GenerationRequest:
    fields.setdefault("max_tokens", 30)
    fields.setdefault("sampling", GREEDY)
    token_ids = engine.tokenize(prompt) if isinstance(prompt, str) else prompt
    return GenerationRequest(prompt_token_ids=token_ids, **fields)


async def ask(engine: Engine, prompt: str | Sequence[int], **fields: Any) -> Answer:
    async with aclosing(engine.generate(request_for(engine, prompt, **fields))) as chunks:
        return Answer([chunk async for chunk in chunks])


def expect(ground: Ground, engine: Engine, prompt: Sequence[int], max_tokens: int = 30) -> str:
    """The greedy answer."""
    vocabulary = engine.vocabulary
    answer = ground.greedy(
        prompt, max_tokens, among=range(len(vocabulary.tokens)), ends=vocabulary.end_token_ids
    )
    return text_of(vocabulary, answer)


def expect_endless(ground: Ground, engine: Engine, prompt: Sequence[int], max_tokens: int = 30) -> str:
    """The greedy answer of `ENDLESS`."""
    vocabulary = engine.vocabulary
    among = [token for token in range(len(vocabulary.tokens)) if token not in vocabulary.end_token_ids]
    return text_of(vocabulary, ground.greedy(prompt, max_tokens, among=among))


def text_of(vocabulary: Vocabulary, token_ids: Sequence[int]) -> str:
    return b"".join(vocabulary.tokens[token] for token in token_ids).decode(errors="replace")


def prompts(count: int, *, longest: int, tokens: int = 300) -> list[list[int]]:
    """Texts of many lengths; some begin as others do."""
    rng = random.Random(1)
    common = [rng.randrange(3, tokens) for _ in range(longest)]
    made = []
    for number in range(count):
        length = rng.randint(1, longest)
        shared = rng.randint(0, length) if number % 3 else 0
        made.append(common[:shared] + [rng.randrange(3, tokens) for _ in range(length - shared)])
    return made
