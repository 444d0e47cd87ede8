"""A text under way, as the hooks of a library's generator use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint
from gallama.engines.answer_streams import DraftChecked, Ended, Job, Started, TokensAdded
from gallama.engines.generators.text import Text, as_told
from gallama.errors import ConstraintFailed, EngineFailed, GallamaError, NotEnoughMemory
from gallama.generation import (
    GenerationRequest,
    SamplingSettings,
    State,
    StateStatus,
    TokenLogprob,
    Vocabulary,
)

PROMPT = [10, 11, 12]

NewState = Callable[[str], State]


@pytest.fixture(scope="module")
def matching(byte_vocabulary: Vocabulary) -> NewState:
    """Grammars of regexes."""
    backend = LLGuidanceBackend(byte_vocabulary)

    def start(regex: str) -> State:
        body = admit_constraints([Constraint(kind="regex", source=regex)], None)
        return backend.compile(AnswerSpec(body=body)).start()

    return start


def text_of(
    vocabulary: Vocabulary, state: State | None = None, *, max_tokens: int = 100, logprobs: int | None = None
) -> Text:
    request = GenerationRequest(
        prompt_token_ids=PROMPT,
        max_tokens=max_tokens,
        sampling=SamplingSettings(),
        state=state,
        logprobs=logprobs,
    )
    return Text(Job(request), vocabulary)


def allowed(mask: NDArray[np.int32] | None) -> set[int]:
    assert mask is not None
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def write(text: Text, answer: bytes) -> None:
    """As an engine would, byte by byte."""
    for byte in answer:
        text.mask()
        text.take(byte)


class Breaking:
    """A grammar that breaks in one of its parts."""

    def __init__(self, part: str) -> None:
        self._part = part

    def _do(self, part: str) -> None:
        if part == self._part:
            raise RuntimeError("a bug")

    @property
    def status(self) -> StateStatus:
        return "running"

    def mask(self, out: NDArray[np.int32]) -> bool:
        self._do("mask")
        out[:] = 0 if self._part == "empty mask" else -1
        return True

    def accepts(self, token_ids: Sequence[int]) -> int:
        return len(token_ids)

    def advance(self, token_ids: Sequence[int]) -> int:
        self._do("advance")
        return 0 if self._part == "refusal" else len(token_ids)

    def forced(self) -> list[int]:
        self._do("forced")
        return []

    def rollback(self, count: int) -> None:
        raise AssertionError

    def clone(self) -> State:
        raise AssertionError


def test_a_free_text_may_go_on_with_every_token(byte_vocabulary: Vocabulary) -> None:
    text = text_of(byte_vocabulary)
    assert text.mask() is None
    text.take(65)
    assert text.token_ids == [*PROMPT, 65]
    assert text.outcome is None


def test_what_the_grammar_forces_at_the_start_is_read_with_the_prompt(
    byte_vocabulary: Vocabulary, matching: NewState
) -> None:
    text = text_of(byte_vocabulary, matching("abc[xy]"))
    text.append_forced()
    assert text.token_ids == [*PROMPT, *b"abc"]
    assert text.take_updates() == [Started(0), TokensAdded(tuple(b"abc"), were_forced=True)]
    assert allowed(text.mask()) == set(b"xy")


def test_a_text_that_is_forced_to_its_end_needs_no_leg(
    byte_vocabulary: Vocabulary, matching: NewState
) -> None:
    text = text_of(byte_vocabulary, matching("abc"))
    text.append_forced()
    assert text.outcome == Ended("stop")
    assert text.take_updates() == [
        Started(0),
        TokensAdded(tuple(b"abc"), were_forced=True),
        Ended("stop"),
    ]


def test_a_run_is_masked_one_by_one_and_counts_as_forced(
    byte_vocabulary: Vocabulary, matching: NewState
) -> None:
    text = text_of(byte_vocabulary, matching("(a123|b45)[xy]"))
    write(text, b"a")
    assert text.forced_run(2) == list(b"12")
    for byte in b"123":
        assert allowed(text.mask()) == {byte}
        text.take(byte)
    text.begin(0)
    assert text.take_updates()[1:] == [
        TokensAdded((ord("a"),), were_forced=False),
        TokensAdded(tuple(b"123"), were_forced=True),
    ]
    assert text.forced_run(2) == []


def test_a_leg_that_starts_in_the_middle_of_a_run_has_the_rest_of_it(
    byte_vocabulary: Vocabulary, matching: NewState
) -> None:
    text = text_of(byte_vocabulary, matching("(a123|b45)[xy]"))
    write(text, b"a1")
    text.append_forced()
    assert text.token_ids == [*PROMPT, *b"a123"]
    assert allowed(text.mask()) == set(b"xy")


def test_a_run_is_cut_where_there_is_no_more_room(byte_vocabulary: Vocabulary, matching: NewState) -> None:
    text = text_of(byte_vocabulary, matching("abcdef[xy]"), max_tokens=4)
    text.append_forced()
    assert text.token_ids == [*PROMPT, *b"abcd"]
    assert text.outcome == Ended("length")


def test_an_answer_of_no_tokens_has_ended_before_its_first_leg(byte_vocabulary: Vocabulary) -> None:
    text = text_of(byte_vocabulary, max_tokens=0)
    text.append_forced()
    assert text.take_updates() == [Started(0), Ended("length")]


def test_the_last_token_of_a_grammar_ends_the_text(byte_vocabulary: Vocabulary, matching: NewState) -> None:
    text = text_of(byte_vocabulary, matching("[ab]"))
    write(text, b"a")
    assert text.outcome == Ended("stop")


def test_an_end_token_ends_the_text_and_is_no_part_of_it(byte_vocabulary: Vocabulary) -> None:
    text = text_of(byte_vocabulary)
    text.take(byte_vocabulary.end_token_id)
    assert text.outcome == Ended("stop")
    assert text.token_ids == PROMPT


def test_an_end_token_where_the_grammar_goes_on_is_an_error(
    byte_vocabulary: Vocabulary, matching: NewState
) -> None:
    text = text_of(byte_vocabulary, matching("[ab]c"))
    text.mask()
    text.take(byte_vocabulary.end_token_id)
    assert isinstance(text.outcome, EngineFailed)


def test_a_token_outside_of_the_mask_is_an_error(byte_vocabulary: Vocabulary, matching: NewState) -> None:
    text = text_of(byte_vocabulary, matching("[ab]c"))
    text.mask()
    text.take(ord("c"))
    assert isinstance(text.outcome, EngineFailed)
    assert text.token_ids == PROMPT


def test_a_token_that_the_vocabulary_has_not_is_an_error(byte_vocabulary: Vocabulary) -> None:
    text = text_of(byte_vocabulary)
    text.take(len(byte_vocabulary.tokens))
    assert isinstance(text.outcome, EngineFailed)


def test_once_it_has_ended_only_the_end_is_allowed_and_nothing_is_taken(
    byte_vocabulary: Vocabulary, matching: NewState
) -> None:
    text = text_of(byte_vocabulary, matching("[ab]"))
    write(text, b"a")
    assert allowed(text.mask()) == {byte_vocabulary.end_token_id}
    text.take(ord("b"))
    assert text.token_ids == [*PROMPT, ord("a")]
    assert text.outcome == Ended("stop")


@pytest.mark.parametrize("part", ["mask", "advance", "forced", "refusal", "empty mask"])
def test_a_grammar_that_breaks_ends_its_own_text_and_raises_nothing(
    byte_vocabulary: Vocabulary, part: str
) -> None:
    text = text_of(byte_vocabulary, Breaking(part))
    text.append_forced()
    text.mask()
    text.take(65)
    assert isinstance(text.outcome, ConstraintFailed if part in ("refusal", "empty mask") else GallamaError)
    assert allowed(text.mask()) == {byte_vocabulary.end_token_id}


def test_with_log_probabilities_all_tokens_are_chosen_one_by_one(
    byte_vocabulary: Vocabulary, matching: NewState
) -> None:
    text = text_of(byte_vocabulary, matching("abc"), logprobs=1)
    text.append_forced()
    assert text.token_ids == PROMPT
    for byte in b"abc":
        text.mask()
        text.take(byte, TokenLogprob(byte, -1.0))
    assert [update for update in text.take_updates() if isinstance(update, TokensAdded)] == [
        TokensAdded((byte,), were_forced=False, logprobs=(TokenLogprob(byte, -1.0),)) for byte in b"abc"
    ]


def test_tokens_wait_for_log_probabilities_that_are_told_later(byte_vocabulary: Vocabulary) -> None:
    text = text_of(byte_vocabulary, logprobs=0)
    text.begin(0)
    text.take(65)
    text.take(66)
    assert text.take_updates() == [Started(0)]
    text.score([TokenLogprob(65, -0.5)])
    assert text.take_updates() == [TokensAdded((65,), were_forced=False, logprobs=(TokenLogprob(65, -0.5),))]


def test_a_step_back_forgets_tokens_that_were_not_scored(
    byte_vocabulary: Vocabulary, matching: NewState
) -> None:
    text = text_of(byte_vocabulary, matching("[ab][cd]"), logprobs=0)
    text.mask()
    text.take(ord("a"), TokenLogprob(ord("a"), -0.5))
    text.mask()
    text.take(ord("c"))
    assert text.outcome == Ended("stop")
    text.step_back()
    assert text.outcome is None
    assert text.token_ids == [*PROMPT, ord("a")]
    assert allowed(text.mask()) == set(b"cd")


def test_a_step_back_keeps_what_has_no_log_probabilities(
    byte_vocabulary: Vocabulary, matching: NewState
) -> None:
    text = text_of(byte_vocabulary, matching("[ab][cd]"))
    write(text, b"a")
    text.step_back()
    assert text.token_ids == [*PROMPT, ord("a")]


def test_it_starts_once_with_no_more_cached_tokens_than_its_prompt_has(byte_vocabulary: Vocabulary) -> None:
    text = text_of(byte_vocabulary)
    text.begin(100)
    text.begin(1)
    assert text.take_updates() == [Started(3)]


def test_drafts_are_told_behind_their_tokens(byte_vocabulary: Vocabulary) -> None:
    text = text_of(byte_vocabulary)
    text.begin(0)
    text.check_drafts(drafted=4, accepted=1)
    text.take(65)
    text.check_drafts(drafted=0, accepted=0)
    assert text.take_updates() == [
        Started(0),
        TokensAdded((65,), were_forced=False),
        DraftChecked(4, 1),
    ]


def test_only_the_first_outcome_counts(byte_vocabulary: Vocabulary) -> None:
    text = text_of(byte_vocabulary, max_tokens=1)
    text.take(65)
    text.fail(RuntimeError("too late"))
    assert text.outcome == Ended("length")


def test_too_little_memory_is_told_as_that_whoever_says_so() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch has it."""

    assert isinstance(as_told(OutOfMemoryError("CUDA out of memory")), NotEnoughMemory)
    assert isinstance(as_told(MemoryError()), NotEnoughMemory)
    assert "bug" not in str(as_told(RuntimeError("a bug")))
