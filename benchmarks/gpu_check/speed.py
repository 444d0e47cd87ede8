"""Tokens per second of an engine against its library's own loop over the same weights, in turns in one run.

- free: free text.
- constrained: a list of people that a schema describes, cut at the same number of tokens.

Both are compared with what the library's own loop makes of free text: what a grammar costs is in the ratio.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.gpu_check.findings import Findings, Row
from benchmarks.gpu_check.load import PERSON, Written, compile_work, request_for, write
from gallama.constraints import LLGuidanceBackend
from gallama.generation import Engine

FREE, CONSTRAINED, LIBRARY = "free", "constrained", "library"
TARGET = 0.95
PEOPLE = {"type": "array", "items": PERSON, "minItems": 50, "maxItems": 50}
_PROMPT = "Text {number}: tell me what is known of the old bridge across the river, and who built it. "


@dataclass(frozen=True)
class Load:
    """Texts that are written at once."""

    at_once: int
    tokens: int
    """Of each answer."""
    temperature: float

    @property
    def prompts(self) -> list[str]:
        return [_PROMPT.format(number=number) for number in range(self.at_once)]


class LibraryLoop(Protocol):
    """The library's own generator with its own model, driven as its examples do."""

    slots: int
    """Texts that it computes side by side, at most."""

    def write(self, load: Load) -> int:
        """Write all texts, free, and wait for them; how many tokens that made."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Turn:
    """What one contender did in one round."""

    seconds: float
    tokens: int
    steps: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def step_ms(self) -> float:
        return 1000 * self.seconds / max(1, self.steps)


Turns = Mapping[str, Sequence[Turn]]
"""By kind of text, and the library's: a turn for each round."""


class Ours:
    """The engine, as a contender."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._grammar = compile_work(LLGuidanceBackend(engine.vocabulary), "json_schema", PEOPLE)

    def write(self, load: Load, kind: str) -> Turn:
        return asyncio.run(self._write(load, kind))

    async def _write(self, load: Load, kind: str) -> Turn:
        started, before = time.perf_counter(), self._engine.status().steps
        written: list[Written] = await asyncio.gather(
            *(
                write(
                    self._engine,
                    request_for(
                        self._engine,
                        prompt,
                        max_tokens=load.tokens,
                        state=self._grammar.start() if kind == CONSTRAINED else None,
                        temperature=load.temperature,
                    ),
                )
                for prompt in load.prompts
            )
        )
        return Turn(
            seconds=time.perf_counter() - started,
            tokens=sum(answer.tokens for answer in written),
            steps=self._engine.status().steps - before,
        )


def compete(ours: Ours, library: LibraryLoop, load: Load, rounds: int) -> Turns:
    """Everybody writes the same load in turns, after a turn of each that warms up."""
    turns: dict[str, list[Turn]] = {FREE: [], CONSTRAINED: [], LIBRARY: []}
    for number in range(rounds + 1):
        for kind, taken in turns.items():
            turn = _take_turn(library, load) if kind == LIBRARY else ours.write(load, kind)
            if number:
                taken.append(turn)
    return turns


def _take_turn(library: LibraryLoop, load: Load) -> Turn:
    started = time.perf_counter()
    tokens = library.write(load)
    # Without drafts a step is a token of each text in it.
    steps = tokens // min(load.at_once, library.slots)
    return Turn(seconds=time.perf_counter() - started, tokens=tokens, steps=steps)


def to_rows(load: Load, turns: Turns, *, draft: bool) -> list[Row]:
    """A row of the table for each kind of text."""
    return [_row(load, kind, turns, draft=draft) for kind in (FREE, CONSTRAINED)]


def _row(load: Load, kind: str, turns: Turns, *, draft: bool) -> Row:
    pairs = list(zip(turns[kind], turns[LIBRARY], strict=True))
    row: Row = {
        "kind": kind,
        "at_once": load.at_once,
        "draft": draft,
        "tokens": statistics.median(ours.tokens for ours, _ in pairs),
        "tok_s": round(statistics.median(ours.rate for ours, _ in pairs), 1),
        "library_tok_s": round(statistics.median(library.rate for _, library in pairs), 1),
        "ratio": round(statistics.median(ours.rate / library.rate for ours, library in pairs), 3),
    }
    # A draft model guesses at free text: under a grammar that the model does not lean to it is mostly wrong.
    if kind == FREE or not draft:
        row["target"] = TARGET
    if not draft:
        differences = [ours.step_ms - library.step_ms for ours, library in pairs]
        row["overhead_ms"] = round(statistics.median(differences), 3)
    return row


def is_met(row: Mapping[str, Any]) -> bool:
    return "target" not in row or bool(row["ratio"] >= row["target"])


def measure(
    findings: Findings,
    ours: Ours,
    library: LibraryLoop,
    loads: Sequence[Load],
    *,
    draft: bool,
    rounds: int,
    deadline: float,
) -> None:
    """Fill the table; a load for which no time is left is told of as such.

    Args:
        deadline: by `time.monotonic()`.
    """
    longest = 0.0
    for load in loads:
        started = time.monotonic()
        if started + longest > deadline:
            findings.check(
                _name(load.at_once, draft),
                False,
                why="no time was left; give this stage a command of its own",
            )
            continue
        rows = to_rows(load, compete(ours, library, load, rounds), draft=draft)
        longest = max(longest, time.monotonic() - started)
        for row in rows:
            findings.row(row)
        missed = [row["kind"] for row in rows if not is_met(row)]
        findings.check(_name(load.at_once, draft), not missed, **({"missed": missed} if missed else {}))


def _name(at_once: int, draft: bool) -> str:
    return f"{at_once} at once {'with' if draft else 'without'} a draft model"
