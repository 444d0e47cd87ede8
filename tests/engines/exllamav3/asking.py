"""Asking an engine, and what it should say by what the model says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint, ConstraintKind
from gallama.generation import (
    Engine,
    GeneratedChunk,
    GenerationRequest,
    SamplingSettings,
    State,
    TokenLogprob,
    Vocabulary,
)
from tests.engines.exllamav3.ground import Ground

GREEDY = SamplingSettings(temperature=0)
# Ends only where a limit is: the end tokens are 0 and 2.
ENDLESS = SamplingSettings(temperature=0, logit_bias={0: -1000, 2: -1000})


@dataclass(frozen=True)
class Answer:
    """All chunks of one generation."""

    chunks: list[GeneratedChunk]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def end(self) -> str | None:
        return self.chunks[-1].end

    @property
    def sampled(self) -> int:
        return sum(chunk.sampled_tokens for chunk in self.chunks)

    @property
    def forced(self) -> int:
        return sum(chunk.forced_tokens for chunk in self.chunks)

    @property
    def drafted(self) -> int:
        return sum(chunk.drafted_tokens for chunk in self.chunks)

    @property
    def accepted(self) -> int:
        return sum(chunk.accepted_draft_tokens for chunk in self.chunks)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for chunk in self.chunks for entry in chunk.logprobs]


class Observed:
    """A grammar that knows which tokens were taken, and sees to it that only those are that it allows."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.taken: list[int] = []

    def advance(self, token_ids: Sequence[int]) -> int:
        assert self._state.status != "must_end", "an answer goes no further than its grammar"
        taken = self._state.advance(token_ids)
        assert taken == len(token_ids), "only what the grammar allows is offered to it"
        self.taken += token_ids
        return taken

    def rollback(self, count: int) -> None:
        self._state.rollback(count)
        del self.taken[len(self.taken) - count :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


class Failing(Observed):
    """A grammar that breaks behind so many tokens."""

    def __init__(self, state: State, behind: int) -> None:
        super().__init__(state)
        self._behind = behind

    def mask(self, out: Any) -> bool:
        if len(self.taken) >= self._behind:
            raise RuntimeError("a bug in the grammar")
        return self._state.mask(out)


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


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(30):
        while (status := engine.status()).busy_slots or status.waiting:  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.001)


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
    import random

    rng = random.Random(1)
    common = [rng.randrange(3, tokens) for _ in range(longest)]
    made = []
    for number in range(count):
        length = rng.randint(1, longest)
        shared = rng.randint(0, length) if number % 3 else 0
        made.append(common[:shared] + [rng.randrange(3, tokens) for _ in range(length - shared)])
    return made
