"""What an engine does: token ids in, text chunks out. Nothing here knows about chat."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

if TYPE_CHECKING:  # the gateway reads this module, and never loads numpy
    import numpy as np
    from numpy.typing import NDArray

StateStatus = Literal["running", "may_end", "must_end", "failed"]
EndReason = Literal["stop", "length"]


class SamplingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. None: whatever the model's defaults say."""

    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    top_k: int | None = None
    """0: all tokens."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    """Multiplies, over prompt and answer; 1 is none."""
    frequency_penalty: float | None = None
    """Subtracted for each time a token stands in the answer."""
    presence_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = {}

    def with_defaults(self, defaults: SamplingSettings) -> SamplingSettings:
        """These settings, completed by `defaults` where they are silent."""
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(defaults, **given)


class State(Protocol):
    """One sequence's place in its grammar. Used by one thread at a time."""

    @property
    def status(self) -> StateStatus: ...

    def mask(self, out: NDArray[np.int32]) -> bool:
        """Write the tokens allowed next as bits, little end first.

        Args:
            out: shape (ceil(vocabulary size / 32),).

        Returns:
            False when every token is allowed and `out` was left alone.

        Raises:
            ConstraintFailed: the constraint engine broke.
            ConstraintTooComplex: it ran out of its limits.
        """
        ...

    def accepts(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens would be taken in a row; nothing changes."""
        ...

    def advance(self, token_ids: Sequence[int]) -> int:
        """Take tokens; returns how many were taken. A refused one leaves the state usable.

        Raises:
            ConstraintFailed, ConstraintTooComplex: as `mask`.
        """
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would cut them; [] where there is a choice."""
        ...

    def rollback(self, count: int) -> None:
        """Undo the last `count` tokens."""
        ...

    def clone(self) -> State: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InfillTokens:
    """What a prompt for a model that fills in is put together with:   prefix TEXT suffix TEXT middle"""

    prefix: int
    suffix: int
    middle: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A model's tokens as raw bytes. One per loaded model, never changed."""

    tokens: tuple[bytes, ...]
    """The text of each token; b"" for control tokens, which are never part of a text."""
    control_tokens: Mapping[str, int]
    """Control tokens by name, as in "<|im_end|>": 2."""
    marks: frozenset[str] = frozenset()
    """Texts of tokens that stand for themselves wherever they are written out, as some "<tool_call>" do."""
    end_token_ids: frozenset[int]
    """Tokens that end an answer."""
    end_token_id: int
    """The one that the model prefers among them."""
    start_token_id: int | None
    """The token that every prompt of this model begins with, if it wants one."""
    infill: InfillTokens | None = None
    """None: the model was not made to fill in."""
    encode: Callable[[bytes], list[int]]
    """Tokenize plain text: no token added in front, no control token recognised."""
    fingerprint: str
    """Equal for equal vocabularies; a part of cache keys."""

    @property
    def probe_token_id(self) -> int:
        """What to compute where it only matters whether anything can be."""
        return self.end_token_id if self.start_token_id is None else self.start_token_id

    def unused_token_ids(self) -> list[int]:
        """Ids that no token has, though logits may."""
        named = {*self.control_tokens.values(), *self.end_token_ids}
        return [token for token, text in enumerate(self.tokens) if not text and token not in named]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate."""

    prompt_token_ids: Sequence[int]
    max_tokens: int
    sampling: SamplingSettings
    state: State | None = None
    """The grammar the answer must follow, at its start; the engine owns it from here on."""
    logprobs: int | None = None
    """How many alternatives to report for each token; None: no log probabilities at all."""
    prompt_logprobs: bool = False
    """With `logprobs`: report as much of the prompt's tokens. Then all of the prompt is computed, whatever is
    cached, and `max_tokens` may be 0."""
    visible_control_tokens: frozenset[int] = frozenset()
    """Control tokens that the caller wants to see as chunks of their own."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, with natural logarithms of probabilities before temperature and grammar."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedChunk:
    """What one step added. Text is never cut inside a character. The counts add up over the chunks."""

    text: str = ""
    control_token: str | None = None
    """A visible control token; then `text` is empty."""
    logprobs: tuple[TokenLogprob, ...] = ()
    sampled_tokens: int = 0
    forced_tokens: int = 0
    """Tokens that the grammar left no choice about, so that none was sampled."""
    drafted_tokens: int = 0
    """Tokens that were guessed ahead and checked."""
    accepted_draft_tokens: int = 0
    """How many of them were right."""
    cached_prompt_tokens: int = 0
    """On the first chunk: prompt tokens that were not computed again."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """On the first chunk, where they were asked for: one for each token of the prompt; None for the first,
    which nothing predicts."""
    end: EndReason | None = None
    """Set on the last chunk, and only there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """What an engine is doing now."""

    busy_slots: int
    waiting: int
    cached_tokens: int
    steps: int = 0
    """Grows with whatever is computed, be it a prompt: an engine at work where it stays the same has hung."""
    sampled_tokens: int = 0
    """Tokens chosen since the engine was loaded; so are the other totals."""
    forced_tokens: int = 0
    """Tokens that grammars left no choice about."""
    drafted_tokens: int = 0
    """Tokens guessed ahead and checked."""
    accepted_draft_tokens: int = 0
    """How many of them were right."""


ReportProgress = Callable[[float], None]
"""Told which part of a model is loaded, 0 to 1; called from the thread that loads it."""


class Engine(Protocol):
    """One loaded model."""

    context_length: int
    """Tokens of prompt and answer together that one sequence may have."""
    chat_template: str
    """The model's own Jinja template; "" when it has none."""
    vocabulary: Vocabulary

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a prompt: control tokens written in it are recognised, nothing is added."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
        """Generate one sequence. Closing the generator frees the slot within one step.

        Raises:
            ConstraintFailed: the grammar's state failed in the middle.
        """
        ...

    def status(self) -> EngineStatus: ...

    async def probe(self) -> None:
        """Compute a token for nobody, and leave what is kept of texts as it was.

        Raises:
            GallamaError: the engine cannot compute any more.
        """
        ...

    async def close(self) -> None: ...
