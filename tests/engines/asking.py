"""Asking an engine, and watching it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gallama.generation import Engine, GeneratedChunk, State, TokenLogprob


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
    def tokens(self) -> int:
        return self.sampled + self.forced

    @property
    def drafted(self) -> int:
        return sum(chunk.drafted_tokens for chunk in self.chunks)

    @property
    def accepted(self) -> int:
        return sum(chunk.accepted_draft_tokens for chunk in self.chunks)

    @property
    def cached(self) -> int:
        return sum(chunk.cached_prompt_tokens for chunk in self.chunks)

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

    def clone(self) -> Observed:
        return Observed(self._state.clone())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


class Breaking(Observed):
    """A grammar that breaks in one of its parts, once a few tokens were taken."""

    def __init__(self, state: State, part: str, after: int) -> None:
        super().__init__(state)
        self._part, self._after = part, after

    def _reach(self, part: str) -> None:
        if part == self._part and len(self.taken) >= self._after:
            raise RuntimeError("a bug in a grammar")

    def mask(self, out: Any) -> bool:
        self._reach("mask")
        return self._state.mask(out)

    def advance(self, token_ids: Sequence[int]) -> int:
        self._reach("advance")
        return super().advance(token_ids)

    def forced(self) -> list[int]:
        self._reach("forced")
        return self._state.forced()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.001)


async def until_idle(engine: Engine) -> None:
    await until(lambda: not (engine.status().busy_slots or engine.status().waiting))
