"""The thread that drives a library's generator, over one that does all it may, and breaks anywhere."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint
from gallama.engines.answer_streams import Ended, Job, Started, TokensAdded, Update
from gallama.engines.generators.text import Text
from gallama.engines.generators.thread import GeneratorThread
from gallama.errors import ContextLengthExceeded, GallamaError
from gallama.generation import GenerationRequest, SamplingSettings, State, TokenLogprob, Vocabulary

SECONDS = 20
REGEXES = ("(yes|no)+", "ab[cd]{3}efg[hi]{2,9}xyz", "fixed from the first to the last byte", "[a-z]*!")


@dataclass(frozen=True)
class Question:
    job: Job
    regex: str | None

    @property
    def first(self) -> int:
        return self.job.request.prompt_token_ids[0]


class Grammars:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._backend = LLGuidanceBackend(vocabulary)

    def start(self, regex: str) -> State:
        body = admit_constraints([Constraint(kind="regex", source=regex)], None)
        return self._backend.compile(AnswerSpec(body=body)).start()

    def answer(self, question: Question) -> tuple[list[int], Ended]:
        """What the model says if nothing breaks, and how that ends."""
        state = None if question.regex is None else self.start(question.regex)
        mask = np.zeros((len(self._vocabulary.tokens) + 31) // 32, dtype=np.int32)
        token_ids = [question.first]
        while len(token_ids) <= question.job.request.max_tokens:
            is_free = state is None or not state.mask(mask)
            token = choice(token_ids, None if is_free else mask)
            if token in self._vocabulary.end_token_ids:
                return token_ids[1:], Ended("stop")
            token_ids.append(token)
            if state is not None:
                state.advance([token])
                if state.status == "must_end":
                    return token_ids[1:], Ended("stop")
        return token_ids[1:], Ended("length")


def choice(token_ids: Sequence[int], mask: np.ndarray | None) -> int:
    """What the model goes on with."""
    number = hash(tuple(token_ids))
    if mask is None:
        return number % 256
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return int(allowed[number % len(allowed)])


class Troubled:
    """Takes some tokens of some texts in a step, and may break at every place."""

    context_length = 1000

    def __init__(self, rng: random.Random) -> None:
        self.slots = rng.randint(1, 5)
        self.legs: dict[Text, int] = {}
        self.between_steps: Callable[[], None] = lambda: None
        self.starts = self.steps = self.rebuilds = 0
        self.is_closed = False
        self._rng = rng
        self._faults = rng.choice((0.0, 0.01, 0.05, 0.3))
        self._has_broken = False

    def start(self, text: Text) -> bool:
        self.starts += 1
        assert text not in self.legs, "a text has one leg at a time"
        if self._rng.random() < self._faults / 8:
            raise ContextLengthExceeded("It is too long.")
        if self.legs and self._rng.random() < 0.2:
            return False
        text.leg = object()
        self.legs[text] = self._rng.randint(1, 9)
        return True

    def cancel(self, text: Text) -> None:
        del self.legs[text]
        self._may_break()

    def step(self) -> None:
        assert not self._has_broken, "it was made anew"
        self.steps += 1
        self.between_steps()
        assert all(text.leg is not None for text in self.legs)
        unscored = []
        for text in list(self.legs):
            self._may_break()
            if self._rng.random() < 0.3:
                continue  # its prompt is being read
            text.begin(0)
            unscored += [(text, token) for token in self._take(text)]
        for text, token in unscored:
            self._may_break()
            text.score([TokenLogprob(token, -1.0)])

    def rebuild(self) -> None:
        self.rebuilds += 1
        self.legs.clear()
        self._has_broken = False

    def probe(self) -> None:
        assert not self.legs
        if self._rng.random() < self._faults:
            raise RuntimeError("CUDA error")

    def cached_tokens(self) -> int:
        return 0

    def close(self) -> None:
        self.is_closed = True

    def _take(self, text: Text) -> list[int]:
        """Some tokens; those of which the log probabilities are to be told."""
        before = len(text.token_ids)
        drafted = text.forced_run(4)
        for _ in range(1 + len(drafted)):
            text.take(choice(text.token_ids, text.mask()))
        self.legs[text] -= 1
        if text.outcome is not None or self.legs[text] <= 0:
            del self.legs[text]
            text.end_leg()
        return text.token_ids[before:] if text.job.request.logprobs is not None else []

    def _may_break(self) -> None:
        if self._rng.random() < self._faults:
            self._has_broken = True
            raise RuntimeError("CUDA error")


class Sink:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.updates: dict[Job, list[Update]] = {}

    def __call__(self, updates: Sequence[tuple[Job, Update]]) -> None:
        with self._changed:
            for job, update in updates:
                self.updates.setdefault(job, []).append(update)
            self._changed.notify_all()

    def wait_for(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: all(map(self._has_ended, jobs)), SECONDS)

    def _has_ended(self, job: Job) -> bool:
        updates = self.updates.get(job, [])
        return job.cancelled or any(isinstance(update, Ended | GallamaError) for update in updates)


def random_question(rng: random.Random, grammars: Grammars) -> Question:
    regex = rng.choice((None, *REGEXES))
    request = GenerationRequest(
        prompt_token_ids=[rng.randrange(256)],
        max_tokens=rng.randint(1, 40),
        sampling=SamplingSettings(),
        state=None if regex is None else grammars.start(regex),
        logprobs=rng.choice((None, None, 0)),
    )
    return Question(Job(request), regex)


@pytest.fixture(scope="module")
def grammars(byte_vocabulary: Vocabulary) -> Grammars:
    return Grammars(byte_vocabulary)


@pytest.mark.parametrize("seed", range(12))
def test_every_answer_is_told_whole_and_ends_once(
    seed: int, byte_vocabulary: Vocabulary, grammars: Grammars
) -> None:
    rng, sink = random.Random(seed), Sink()
    generator = Troubled(rng)
    thread = GeneratorThread(lambda: generator, byte_vocabulary, sink, name="troubled")
    questions = [random_question(rng, grammars) for _ in range(24)]
    late = iter(questions[12:])
    probes = []

    def disturb() -> None:
        if rng.random() < 0.3 and (question := next(late, None)) is not None:
            thread.submit(question.job)
        if rng.random() < 0.03:
            thread.cancel(rng.choice(questions).job)
            sink(())  # nobody is told of that
        if rng.random() < 0.05:
            probes.append(thread.probe())

    generator.between_steps = disturb
    thread.start()
    for question in questions[:12]:
        thread.submit(question.job)
    sink.wait_for([question.job for question in questions[:12]])
    for question in late:
        thread.submit(question.job)
    sink.wait_for([question.job for question in questions])
    probes.append(thread.probe())  # behind it, nobody has a slot any more
    for probe in probes:
        probe.exception(SECONDS)
    status = thread.status()
    thread.close()

    assert (status.busy_slots, status.waiting) == (0, 0)
    assert generator.is_closed
    assert not generator.legs
    told = [update for updates in sink.updates.values() for update in updates]
    assert status.sampled_tokens + status.forced_tokens == sum(
        len(update.token_ids) for update in told if isinstance(update, TokensAdded)
    )
    for question in questions:
        _check(question, sink.updates.get(question.job, []), grammars)


def _check(question: Question, updates: Sequence[Update], grammars: Grammars) -> None:
    outcomes = [update for update in updates if isinstance(update, Ended | GallamaError)]
    tokens = [token for update in updates if isinstance(update, TokensAdded) for token in update.token_ids]
    whole, end = grammars.answer(question)
    assert tokens == whole[: len(tokens)]
    if question.job.cancelled and not outcomes:
        return
    assert outcomes == updates[-1:]
    if isinstance(outcomes[0], Ended):
        assert (tokens, outcomes[0]) == (whole, end)
    started = [place for place, update in enumerate(updates) if isinstance(update, Started)]
    assert started in ([0], []) if isinstance(outcomes[0], GallamaError) and not tokens else started == [0]
