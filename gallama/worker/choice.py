"""One of a request's answers: generated, read, checked, and where it fails made again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import msgspec

from gallama.constraints import AnswerSpec, Compiled
from gallama.conversation import (
    ChatEvent,
    ConstraintKind,
    Finished,
    FinishReason,
    Guarantee,
    ReasoningText,
)
from gallama.errors import ConstraintFailed
from gallama.generation import (
    EndReason,
    Engine,
    GeneratedChunk,
    GenerationRequest,
    SamplingSettings,
    State,
    TokenLogprob,
)
from gallama.worker.answer_parser import AnswerParser
from gallama.worker.raw_answer import RawAnswer, Run, run_of
from gallama.worker.value_checks import Misfit, ValueChecks

MAX_ATTEMPTS = 4
"""How often an answer is generated until one passes its checks."""
# What is generated again at temperature 0 would be the same again.
_TEMPERATURE_OF_RETRIES = 0.8


class Choice:
    """Generates one answer; `events` may be read once."""

    def __init__(
        self,
        engine: Engine,
        request: GenerationRequest,
        *,
        index: int,
        spec: AnswerSpec | None,
        grammar: Compiled | None,
        checks: ValueChecks | None,
        start_state: Callable[[Sequence[int]], State | None],
        new_parser: Callable[[], AnswerParser],
        may_be_invalid: bool,
        explains: bool,
    ) -> None:
        """
        Args:
            request: the first attempt, without a state.
            checks: what the finished answer must pass, where the grammar does not hold everything.
            start_state: the state behind these tokens of an earlier attempt.
            may_be_invalid: whether an answer that fails its checks is returned all the same, marked.
            explains: whether to say how each part of the answer came about.
        """
        self._engine = engine
        self._request = request
        self._index = index
        self._spec = spec
        self._grammar = grammar
        self._start_state = start_state
        self._new_parser = new_parser
        self._may_be_invalid = may_be_invalid
        self._explains = explains
        self._checks = checks
        self._attempts = 0
        self._sampled_tokens = 0
        self._forced_tokens = 0
        self.reasoning_tokens = 0
        self.cached_prompt_tokens = 0
        self.prompt_logprobs: Sequence[TokenLogprob | None] = ()
        """Known when the first event is; () where they are not wanted."""
        self.drafted_tokens = 0
        """Tokens that were guessed ahead and checked, in all attempts."""
        self.accepted_draft_tokens = 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self._request.prompt_logprobs

    @property
    def generated_tokens(self) -> int:
        """Tokens of all attempts."""
        return self._sampled_tokens + self._forced_tokens

    async def events(self) -> AsyncGenerator[ChatEvent, None]:
        """
        Raises:
            ConstraintFailed: no attempt passed its checks.
        """
        kept = RawAnswer()
        while True:
            attempt = _Attempt(kept, self._new_parser(), None if self._may_be_invalid else self._checks)
            async with aclosing(self._run(attempt)) as events:
                async for event in events:
                    yield event
            misfit = None if self._checks is None else await asyncio.to_thread(attempt.misfit, self._checks)
            if misfit is None or self._may_be_invalid:
                break
            if self._attempts == MAX_ATTEMPTS:
                raise _failure(misfit)
            kept = attempt.raw.until(attempt.restart_offset(misfit, self._attempts))
        for event in attempt.held_back:
            yield event
        yield Finished(
            self._index,
            reason=attempt.finish_reason,
            guarantee=self._guarantee(attempt, is_valid=misfit is None),
            spans=attempt.raw.spans() if self._explains else None,
        )

    async def _run(self, attempt: _Attempt) -> AsyncGenerator[ChatEvent, None]:
        """The events of one attempt that need not be held back."""
        self._attempts += 1
        attempt.replay()
        if self._grammar is None:
            generation = self._generation(attempt.raw)
        else:  # in a thread: for a large template it takes a tenth of a second
            generation = await asyncio.to_thread(self._generation, attempt.raw)
        async with aclosing(self._engine.generate(generation)) as chunks:
            async for chunk in chunks:
                self._count(chunk, attempt)
                for event in attempt.take(chunk, self._bound_by(attempt)):
                    yield event
                if attempt.parser.found_stop_word:
                    break  # closes the generation
        for event in attempt.finish():
            yield event

    def _generation(self, kept: RawAnswer) -> GenerationRequest:
        """What is to be generated behind what is kept of an earlier attempt."""
        token_ids = kept.token_ids(self._engine.vocabulary)
        return replace(
            self._request,
            prompt_token_ids=[*self._request.prompt_token_ids, *token_ids],
            # The tokenizer may cut what is kept into more tokens than it was made of.
            max_tokens=max(min(1, self._request.max_tokens), self._request.max_tokens - len(token_ids)),
            sampling=_sampling_of_attempt(self._request.sampling, self._attempts),
            state=self._start_state(token_ids),
            prompt_logprobs=self._request.prompt_logprobs and self._attempts == 1,
        )

    def _count(self, chunk: GeneratedChunk, attempt: _Attempt) -> None:
        tokens = chunk.sampled_tokens + chunk.forced_tokens
        self._sampled_tokens += chunk.sampled_tokens
        self._forced_tokens += chunk.forced_tokens
        self.drafted_tokens += chunk.drafted_tokens
        self.accepted_draft_tokens += chunk.accepted_draft_tokens
        self.reasoning_tokens += tokens if attempt.parser.is_reasoning else 0
        if self._attempts == 1:
            self.cached_prompt_tokens += chunk.cached_prompt_tokens
            self.prompt_logprobs = self.prompt_logprobs or chunk.prompt_logprobs

    def _bound_by(self, attempt: _Attempt) -> ConstraintKind | None:
        if self._spec is None:
            return None
        if attempt.parser.is_reasoning:
            return None if self._spec.template is None else "template"
        return None if self._spec.body is None else self._spec.kind

    def _guarantee(self, attempt: _Attempt, *, is_valid: bool) -> Guarantee | None:
        if self._spec is None or self._grammar is None:
            return None
        return Guarantee(
            kind=self._spec.kind,
            beside=self._spec.beside,
            engine=self._grammar.backend,
            by="grammar" if self._checks is None else "grammar+validation",
            validated_keywords=self._grammar.unenforced,
            valid=is_valid,
            attempts=self._attempts,
            complete=attempt.is_complete,
            sampled_tokens=self._sampled_tokens,
            forced_tokens=self._forced_tokens,
        )


class _Attempt:
    """One try: what was written, and which events of it nobody has seen yet."""

    def __init__(self, kept: RawAnswer, parser: AnswerParser, holding_back_for: ValueChecks | None) -> None:
        self.raw = kept
        self.parser = parser
        self.held_back: list[ChatEvent] = []
        self._answer: list[ChatEvent] = []
        """All events but those of thinking."""
        self._checks = holding_back_for
        self._end: EndReason = "stop"
        self._held_from = 0
        """How long the raw text was in front of the run that the first event to be held back came of."""
        self._last_thoughts = (0, 0)
        """Where in the raw text the last run begins and ends that has thinking in it."""

    @property
    def is_complete(self) -> bool:
        return self._end == "stop" and not self.parser.found_stop_word

    @property
    def finish_reason(self) -> FinishReason:
        return "tool_calls" if self._end == "stop" and self.parser.has_calls else self._end

    def replay(self) -> None:
        """Read again what was kept; what of it is not held back has been seen."""
        kept, self.raw = self.raw, RawAnswer()
        for run in kept.runs:
            self._read(run, run.to_chunk())

    def take(self, chunk: GeneratedChunk, constraint: ConstraintKind | None) -> Sequence[ChatEvent]:
        self._end = chunk.end or self._end
        if chunk.end == "length":
            # Of a character that the limit has cut; a mark around calls that it may belong to stays whole.
            chunk = replace(chunk, text=chunk.text.removesuffix("\ufffd"))
        return self._read(run_of(chunk, constraint), chunk)

    def finish(self) -> Sequence[ChatEvent]:
        return self._release(self.parser.finish(), self.raw.length)

    def misfit(self, checks: ValueChecks) -> Misfit | None:
        """What of the answer breaks its schema."""
        return checks.first_misfit(self._answer, is_complete=self.is_complete)

    def restart_offset(self, misfit: Misfit, attempt: int) -> int:
        """Where in the raw text to go on, never inside of the thinking: that has been seen, and is complete.

        Any place behind it is right; the later it is, the less is lost.
        """
        begin, end = self._last_thoughts
        text, start = self.raw.text, begin
        for value in (*misfit.precursors, misfit.text):
            found = text.find(value, start)
            if found < 0:  # the family writes values in a form of its own
                return max(self._held_from, end)
            start = found + len(value)
        return max(start - len(misfit.text) + misfit.restart_offset(attempt), end)

    def _read(self, run: Run, chunk: GeneratedChunk) -> Sequence[ChatEvent]:
        was_thinking = self.parser.is_reasoning
        start = self.raw.length
        released = self._release(self.parser.feed(chunk), start)
        if was_thinking or self.parser.is_reasoning:
            self._last_thoughts = (start, start + len(run.text))
        if run.text or run.tokens:
            self.raw.add(run)
        return released

    def _release(self, events: Sequence[ChatEvent], start: int) -> Sequence[ChatEvent]:
        """Those events that may be seen now; the others are kept back, and all that come after them."""
        self._answer += [event for event in events if not isinstance(event, ReasoningText)]
        if self._checks is None:
            return events
        released: list[ChatEvent] = []
        for event in events:
            if not self.held_back and not self._checks.concern(event):
                released.append(event)
                continue
            self._held_from = self._held_from if self.held_back else start
            self.held_back.append(event)
        return released


def _sampling_of_attempt(sampling: SamplingSettings, attempt: int) -> SamplingSettings:
    """Other random numbers for each attempt, and the same again for the same seed."""
    if attempt == 1:
        return sampling
    temperature = _TEMPERATURE_OF_RETRIES if sampling.temperature == 0 else sampling.temperature
    seed = None if sampling.seed is None else sampling.seed + 1_000_003 * attempt
    return msgspec.structs.replace(sampling, temperature=temperature, seed=seed)


def _failure(misfit: Misfit) -> ConstraintFailed:
    place = "".join(f"/{step}" for step in misfit.problem.path)
    return ConstraintFailed(
        f"The model wrote no valid value in {MAX_ATTEMPTS} attempts; at `{place}`:"
        f" {misfit.problem.message[:300]}. Say in the prompt what is wanted, or make the schema simpler."
    )
