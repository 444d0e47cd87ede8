"""What a model wrote, token runs and all: to go on from a place in it, and to tell how it came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from gallama.conversation import ConstraintKind, Span
from gallama.generation import GeneratedChunk, TokenLogprob, Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The text of a few tokens, or one control token."""

    text: str
    """Of a control token its name; "" of a token that only begins a character."""
    is_control_token: bool
    tokens: int
    by: Literal["sampled", "forced"]
    constraint: ConstraintKind | None
    logprobs: tuple[TokenLogprob, ...] = ()

    def to_chunk(self) -> GeneratedChunk:
        """The run as if it was generated now, without counts."""
        if self.is_control_token:
            return GeneratedChunk(control_token=self.text)
        return GeneratedChunk(text=self.text, logprobs=self.logprobs)


def run_of(chunk: GeneratedChunk, constraint: ConstraintKind | None) -> Run:
    """
    Args:
        constraint: what held for it.
    """
    return Run(
        text=chunk.control_token or chunk.text,
        is_control_token=chunk.control_token is not None,
        tokens=chunk.sampled_tokens + chunk.forced_tokens,
        by="forced" if chunk.forced_tokens else "sampled",
        constraint=constraint,
        logprobs=chunk.logprobs,
    )


class RawAnswer:
    """Everything that was generated for one answer, in order, before anything was made of it."""

    def __init__(self, runs: list[Run] | None = None) -> None:
        self._runs = runs or []
        self.length = sum(len(run.text) for run in self._runs)
        """Of its `text`, without putting that together."""

    @property
    def text(self) -> str:
        return "".join(run.text for run in self._runs)

    @property
    def runs(self) -> Sequence[Run]:
        return self._runs

    def add(self, run: Run) -> None:
        self._runs.append(run)
        self.length += len(run.text)

    def until(self, offset: int) -> RawAnswer:
        """The answer up to a place in its `text`, or a little less.

        What cannot be cut is left out where the place is inside of it: a control token, and a token that
        has a log probability.
        """
        kept: list[Run] = []
        for run in self._runs:
            if offset < len(run.text):
                kept += _beginning(run, offset)
                break
            kept.append(run)
            offset -= len(run.text)
        while kept and not kept[-1].text:
            kept.pop()
        return RawAnswer(kept)

    def token_ids(self, vocabulary: Vocabulary) -> list[int]:
        """The answer as the tokenizer would cut it."""
        ids: list[int] = []
        for is_control_token, runs in groupby(self._runs, key=lambda run: run.is_control_token):
            if is_control_token:
                ids += [vocabulary.control_tokens[run.text] for run in runs]
            else:
                ids += vocabulary.encode("".join(run.text for run in runs).encode())
        return ids

    def spans(self) -> tuple[Span, ...]:
        """Neighbours that came about in the same way made one."""
        groups = groupby(self._runs, key=lambda run: (run.by, run.constraint))
        return tuple(_span(list(runs)) for _, runs in groups)


def _beginning(run: Run, length: int) -> list[Run]:
    if not length or run.is_control_token or run.logprobs:
        return []
    return [replace(run, text=run.text[:length])]


def _span(runs: list[Run]) -> Span:
    return Span(
        text="".join(run.text for run in runs),
        tokens=sum(run.tokens for run in runs),
        by=runs[0].by,
        constraint=runs[0].constraint,
    )
