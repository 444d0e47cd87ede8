from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.config import ModelSpec
from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint, ConstraintKind
from gallama.engines import ENGINES
from gallama.errors import ConstraintFailed, GallamaError, InvalidConfig, ModelLoadFailed, WorkerUnavailable
from gallama.generation import (
    Engine,
    GeneratedChunk,
    GenerationRequest,
    SamplingSettings,
    State,
    StateStatus,
)
from tests.engines.asking import Answer

GREEDY = SamplingSettings(temperature=0)
PHRASE = "the quick brown fox jumps over the lazy dog"
# In other company or from the cache the last bits of a computation differ; here they decide nothing.
FORESEEABLE = (
    "Count: one, two, three, four, five, six, seven,",
    "1 2 3 4 5 6 7 8 9 10 11",
    "a b c d e f g h i j k l m n o p",
)
PLAN_SCHEMA = {
    "type": "object",
    "properties": {
        "name_of_the_city": {"enum": ["Paris", "London", "Tokyo"]},
        "is_capital": {"type": "boolean"},
        "season": {"enum": ["summer", "winter"]},
    },
    "required": ["name_of_the_city", "is_capital", "season"],
    "additionalProperties": False,
}


def turn(text: str) -> str:
    return f"{text}<|im_end|>\n<|im_start|>assistant\n"


def request_for(engine: Engine, prompt: str, *, max_tokens: int = 12, **fields: Any) -> GenerationRequest:
    fields.setdefault("sampling", GREEDY)
    return GenerationRequest(prompt_token_ids=engine.tokenize(prompt), max_tokens=max_tokens, **fields)


async def generate(engine: Engine, prompt: str, **fields: Any) -> Answer:
    async with aclosing(engine.generate(request_for(engine, prompt, **fields))) as chunks:
        return Answer([chunk async for chunk in chunks])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  an engine says what it does only when asked
            await asyncio.sleep(0.001)


async def until_idle(engine: Engine) -> None:
    await until(lambda: engine.status().busy_slots == engine.status().waiting == 0)


async def until_text(chunks: AsyncGenerator[GeneratedChunk, None]) -> None:
    async for chunk in chunks:
        if chunk.sampled_tokens:
            return


def without_end(engine: Engine, **settings: Any) -> SamplingSettings:
    """Settings with which an answer ends at its limit only."""
    biases = dict.fromkeys(engine.vocabulary.end_token_ids, -1000.0)
    return SamplingSettings(logit_bias=biases, **{"temperature": 0, **settings})


@pytest.fixture(scope="module")
def grammar(smollm2: Engine) -> Grammar:
    return Grammar(smollm2)


class Grammar:
    """Starts states of llguidance grammars."""

    def __init__(self, engine: Engine) -> None:
        self._backend = LLGuidanceBackend(engine.vocabulary)

    def __call__(self, kind: ConstraintKind, source: object) -> State:
        body = admit_constraints([Constraint(kind=kind, source=source)], None)
        return self._backend.compile(AnswerSpec(body=body)).start()


class Observed:
    """A state that writes down what it takes, and may be told not to force."""

    def __init__(self, state: State, *, forces: bool = True) -> None:
        self._state = state
        self._forces = forces
        self.taken: list[int] = []

    @property
    def status(self) -> StateStatus:
        return self._state.status

    def mask(self, out: NDArray[np.int32]) -> bool:
        return self._state.mask(out)

    def accepts(self, token_ids: Sequence[int]) -> int:
        return self._state.accepts(token_ids)

    def advance(self, token_ids: Sequence[int]) -> int:
        self.taken += token_ids
        return self._state.advance(token_ids)

    def forced(self) -> list[int]:
        return self._state.forced() if self._forces else []

    def rollback(self, count: int) -> None:
        self._state.rollback(count)

    def clone(self) -> State:
        return Observed(self._state.clone(), forces=self._forces)


class Played(Observed):
    """A state that allows one token after another, and then the end."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._left = list(token_ids)

    @property
    def status(self) -> StateStatus:
        return "running" if self._left else "must_end"

    def mask(self, out: NDArray[np.int32]) -> bool:
        out[:] = 0
        out.view(np.uint32)[self._left[0] // 32] = 1 << (self._left[0] % 32)
        return True

    def advance(self, token_ids: Sequence[int]) -> int:
        for token in token_ids:
            assert token == self._left.pop(0)
        return len(token_ids)

    def forced(self) -> list[int]:
        return []


class Failing(Played):
    """A state that breaks at its first mask."""

    def __init__(self, error: Exception) -> None:
        super().__init__([0])
        self._error = error

    def mask(self, out: NDArray[np.int32]) -> bool:
        raise self._error


# The text of an answer


async def test_greedy_text_is_the_same_alone_and_beside_others(smollm2: Engine) -> None:
    alone = [(await generate(smollm2, prompt, max_tokens=6)).text for prompt in FORESEEABLE]
    together = await asyncio.gather(*(generate(smollm2, prompt, max_tokens=6) for prompt in FORESEEABLE))
    assert [answer.text for answer in together] == alone


async def test_greedy_text_is_the_same_with_and_without_its_prompt_in_the_cache(smollm2: Engine) -> None:
    prompt = "From memory: " + FORESEEABLE[1]
    first, second = [await generate(smollm2, prompt, max_tokens=6) for _ in range(2)]
    assert second.cached > first.cached
    assert second.text == first.text


async def test_no_chunk_cuts_a_character(smollm2: Engine, grammar: Grammar) -> None:
    states = [grammar("regex", pattern) for pattern in ("[一-龥]{5}", "[😀-😎]{4}", "([à-ü]|€){6}")]
    requests = [
        generate(smollm2, turn("Write!"), max_tokens=60, state=state, sampling=SamplingSettings(seed=seed))
        for seed, state in enumerate(states)
    ]
    for answer, length in zip(await asyncio.gather(*requests), (5, 4, 6), strict=True):
        assert answer.end == "stop"
        assert len(answer.text) == length
        assert "\ufffd" not in answer.text


async def test_a_character_that_a_limit_cuts_is_marked(smollm2: Engine, grammar: Grammar) -> None:
    answer = await generate(smollm2, turn("Write!"), max_tokens=1, state=grammar("regex", "[😀-😎]"))
    assert (answer.text, answer.end) == ("\ufffd", "length")


async def test_a_visible_control_token_is_a_chunk_of_its_own(smollm2: Engine) -> None:
    marker = smollm2.vocabulary.control_tokens["<|im_start|>"]
    (first_byte, *_) = smollm2.vocabulary.encode("😀".encode())
    tokens = [*smollm2.tokenize("one"), first_byte, marker, *smollm2.tokenize("two")]
    for visible in (frozenset({marker}), frozenset[int]()):
        answer = await generate(
            smollm2, turn("Go"), state=Played(tokens), visible_control_tokens=visible, max_tokens=20
        )
        parts = [chunk.control_token or chunk.text for chunk in answer.chunks]
        text = "".join(parts)
        assert text == ("one\ufffd<|im_start|>two" if visible else "one\ufffdtwo")
        assert answer.tokens == len(tokens)


# Limits and ends


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
async def test_a_limit_holds_to_the_token(smollm2: Engine, max_tokens: int) -> None:
    answer = await generate(
        smollm2, turn("Count to 100."), max_tokens=max_tokens, sampling=without_end(smollm2)
    )
    assert (answer.tokens, answer.end) == (max_tokens, "length")


async def test_a_limit_holds_in_the_middle_of_a_forced_run(smollm2: Engine, grammar: Grammar) -> None:
    answer = await generate(smollm2, turn("Go"), max_tokens=3, state=grammar("choice", [PHRASE]))
    assert (answer.sampled, answer.forced, answer.end) == (0, 3, "length")
    assert answer.text
    assert PHRASE.startswith(answer.text)


async def test_the_end_token_ends_an_answer_and_is_no_part_of_it(smollm2: Engine) -> None:
    sampling = SamplingSettings(temperature=0, logit_bias={smollm2.vocabulary.end_token_id: 1000})
    answer = await generate(smollm2, turn("Be brief."), sampling=sampling)
    assert (answer.text, answer.tokens, answer.end) == ("", 0, "stop")


async def test_a_grammar_that_is_fulfilled_ends_an_answer(smollm2: Engine, grammar: Grammar) -> None:
    answer = await generate(smollm2, turn("Yes or no?"), state=grammar("choice", ["yes", "no"]))
    assert answer.end == "stop"
    assert answer.text in ("yes", "no")


# Grammars


async def test_what_is_forced_is_cut_into_tokens_as_the_tokenizer_does(
    smollm2: Engine, grammar: Grammar
) -> None:
    state = Observed(grammar("choice", [PHRASE]))
    answer = await generate(smollm2, turn("Go"), max_tokens=50, state=state)
    assert answer.text == PHRASE
    assert state.taken == smollm2.vocabulary.encode(PHRASE.encode())
    assert (answer.sampled, answer.forced) == (0, len(state.taken))


@pytest.mark.parametrize("city", ["Paris", "Tokyo"])
async def test_greedy_text_is_the_same_with_and_without_forced_runs(
    smollm2: Engine, grammar: Grammar, city: str
) -> None:
    plan = f'{{"name_of_the_city":"{city}","is_capital":true,"season":"winter"}}'
    answers = [
        await generate(
            smollm2,
            f"{plan}\n{plan}\n{plan}\n",
            max_tokens=80,
            state=Observed(grammar("json_schema", PLAN_SCHEMA), forces=forces),
        )
        for forces in (True, False)
    ]
    assert answers[0].text == answers[1].text == plan
    assert answers[0].sampled < answers[1].sampled / 2
    assert answers[1].forced == 0


async def test_every_token_has_its_log_probability_under_a_grammar_too(
    smollm2: Engine, grammar: Grammar
) -> None:
    state = Observed(grammar("json_schema", PLAN_SCHEMA))
    answer = await generate(smollm2, turn("Go"), max_tokens=80, state=state, logprobs=2)
    entries = [entry for chunk in answer.chunks for entry in chunk.logprobs]
    assert [entry.token_id for entry in entries] == state.taken
    assert len(entries) == answer.tokens
    assert b"".join(smollm2.vocabulary.tokens[entry.token_id] for entry in entries).decode() == answer.text
    for entry in entries:
        (best, best_value), (_, second_value) = entry.top
        assert 0 >= best_value >= second_value
        assert best_value >= entry.logprob
        assert (best == entry.token_id) <= (best_value == entry.logprob)


async def test_log_probabilities_of_greedy_tokens_are_the_highest(smollm2: Engine) -> None:
    answer = await generate(smollm2, turn("Hello!"), logprobs=1, sampling=without_end(smollm2))
    entries = [entry for chunk in answer.chunks for entry in chunk.logprobs]
    assert [entry.top for entry in entries] == [((entry.token_id, entry.logprob),) for entry in entries]


@pytest.mark.parametrize("error", [ConstraintFailed("too deep"), ZeroDivisionError("a bug")])
async def test_a_grammar_that_breaks_ends_only_its_own_answer(
    smollm2: Engine, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    other = asyncio.create_task(generate(smollm2, turn("I go on."), sampling=without_end(smollm2)))
    with pytest.raises(GallamaError) as caught:
        await generate(smollm2, turn("I break."), state=Failing(error))
    assert isinstance(caught.value, ConstraintFailed) == isinstance(error, ConstraintFailed)
    assert (await other).tokens == 12
    await until_idle(smollm2)


# Repetition and the cache


async def test_a_seed_repeats_an_answer_whatever_came_in_between(smollm2: Engine) -> None:
    prompt = turn("Tell a story about a dragon, a bridge and a very small key.")
    seeded = without_end(smollm2, temperature=1, seed=5)
    first = await generate(smollm2, prompt, sampling=seeded, max_tokens=16)
    again = await generate(smollm2, prompt, sampling=seeded, max_tokens=16)
    await generate(smollm2, prompt, max_tokens=3)
    await generate(smollm2, turn("Something else."), max_tokens=3)
    later = await generate(smollm2, prompt, sampling=seeded, max_tokens=16)
    assert first.text == again.text == later.text
    other = await generate(smollm2, prompt, sampling=without_end(smollm2, temperature=1, seed=6))
    assert other.text[:20] != first.text[:20]


async def test_the_next_turn_of_a_conversation_reads_only_what_is_new(smollm2: Engine) -> None:
    prompt = turn("Conversations grow at their end, so that their beginning is known.")
    first = await generate(smollm2, prompt, sampling=without_end(smollm2))
    new_turn = turn("<|im_end|>\n<|im_start|>user\nGo on.")
    second_prompt = prompt + first.text + new_turn
    second = await generate(smollm2, second_prompt, max_tokens=2)
    prompt_tokens = len(smollm2.tokenize(second_prompt))
    assert second.cached >= prompt_tokens - len(smollm2.tokenize(new_turn)) - 2
    assert second.cached < prompt_tokens


async def test_equal_prompts_at_once_are_read_once(smollm2: Engine) -> None:
    prompt = turn("Equal prompts arrive together. " + "They are long enough to be worth it. " * 30)
    prompt_tokens = len(smollm2.tokenize(prompt))
    first, *others = await asyncio.gather(*(generate(smollm2, prompt, max_tokens=2) for _ in range(3)))
    assert first.cached < prompt_tokens // 10
    assert all(answer.cached > prompt_tokens * 3 // 4 for answer in others)
    assert len({answer.text for answer in (first, *others)}) == 1


# Many at once


async def test_closing_a_stream_frees_its_slot(smollm2: Engine) -> None:
    chunks = smollm2.generate(request_for(smollm2, turn("Go on for ever."), max_tokens=1500))
    await until_text(chunks)
    assert smollm2.status().busy_slots == 1
    await chunks.aclose()
    await until_idle(smollm2)


async def test_giving_up_frees_the_slot_while_a_long_prompt_is_read(smollm2: Engine) -> None:
    prompt = turn("Nobody waits for the end of this. " * 150)
    reading = asyncio.create_task(generate(smollm2, prompt))
    await until(lambda: smollm2.status().busy_slots == 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until_idle(smollm2)


async def test_a_stream_that_is_closed_before_its_first_chunk_leaves_nothing(smollm2: Engine) -> None:
    chunks = smollm2.generate(request_for(smollm2, turn("Never asked.")))
    await chunks.aclose()
    waiting = asyncio.create_task(generate(smollm2, turn("Asked, and given up at once.")))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await until_idle(smollm2)


async def test_a_long_prompt_does_not_stop_those_who_write(smollm2: Engine) -> None:
    """Counted in tokens, not in seconds: one for each piece of the prompt."""
    long_prompt = turn("This prompt takes many steps to read. " * 70)
    writer = smollm2.generate(
        request_for(smollm2, turn("Write."), max_tokens=1000, sampling=without_end(smollm2))
    )
    async with aclosing(writer):
        await until_text(writer)
        reader = asyncio.create_task(generate(smollm2, long_prompt, max_tokens=1))
        written = 0
        while not reader.done():
            written += (await anext(writer)).sampled_tokens
    assert len(smollm2.tokenize(long_prompt)) > 4 * 128
    assert written >= 4


async def test_random_company_does_not_disturb_an_answer(smollm2: Engine, grammar: Grammar) -> None:
    """Streams start, end and leave at random; every answer that is waited for is whole."""
    rng = random.Random(3)

    async def ask(number: int) -> None:
        await asyncio.sleep(rng.random())
        pattern = rng.choice(["[a-z]{3,9}", "[0-9]{4}", "(ja|nein)+!"])
        request = generate(
            smollm2,
            turn(f"Question {number}."),
            max_tokens=30,
            state=grammar("regex", pattern),
            sampling=SamplingSettings(temperature=1.5),
        )
        if rng.random() < 0.3:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(request, rng.random() * 0.02)
            return
        answer = await request
        assert answer.end == "length" or re.fullmatch(pattern, answer.text), answer.text

    await asyncio.gather(*(ask(number) for number in range(24)))
    await until_idle(smollm2)
    assert smollm2.status().cached_tokens > 0


# Loading


@pytest.fixture(scope="module")
def small(smollm2_path: Path) -> Iterator[Engine]:
    """Three slots that share a cache which is too small for three, and a full stop that ends answers."""
    engine = load(
        smollm2_path, max_seq_len=256, cache_size=256, max_concurrent_requests=3, eos_token_list=["."]
    )
    yield engine
    asyncio.run(engine.close())


def load(path: Path, **keys: Any) -> Engine:
    return ENGINES["llama_cpp"](ModelSpec(model_id=str(path), **keys), path)


async def test_a_cache_that_is_too_small_for_all_lets_all_finish(small: Engine) -> None:
    prompts = [turn(f"{start} " + "Some words to fill the cache. " * 10) for start in ("One", "Two", "Three")]
    answers = await asyncio.gather(
        *(generate(small, prompt, max_tokens=60, sampling=without_end(small)) for prompt in prompts)
    )
    tokens = sum(len(small.tokenize(prompt)) for prompt in prompts) + 3 * 60
    assert tokens > 256 * 1.3
    assert [(answer.tokens, answer.end) for answer in answers] == [(60, "length")] * 3
    await until_idle(small)


async def test_more_requests_than_slots_wait_and_may_leave_the_line(small: Engine) -> None:
    endless = [
        small.generate(
            request_for(small, turn(f"Number {number}."), max_tokens=200, sampling=without_end(small))
        )
        for number in range(3)
    ]
    for chunks in endless:
        await until_text(chunks)
    waiting = [asyncio.create_task(generate(small, turn(f"Waiting {number}."))) for number in range(2)]
    await until(lambda: small.status().waiting == 2)
    waiting[0].cancel()
    await until(lambda: small.status().waiting == 1)
    for chunks in endless:
        await chunks.aclose()
    assert (await waiting[1]).tokens
    await until_idle(small)


async def test_more_end_tokens_end_an_answer(small: Engine) -> None:
    (full_stop,) = small.tokenize(".")
    assert full_stop in small.vocabulary.end_token_ids
    answer = await generate(small, turn("Write a sentence about cats."), max_tokens=100)
    assert answer.end == "stop"
    assert "." not in answer.text


async def test_closing_ends_what_runs_and_waits_in_an_error(smollm2_path: Path) -> None:
    engine = load(smollm2_path, max_seq_len=512, max_concurrent_requests=1)
    late = engine.generate(request_for(engine, turn("Too late.")))
    requests = [
        asyncio.create_task(
            generate(engine, turn(f"Request {number}."), max_tokens=400, sampling=without_end(engine))
        )
        for number in range(3)
    ]
    await until(lambda: engine.status().busy_slots == 1)
    await engine.close()
    for outcome in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(outcome, WorkerUnavailable)
    with pytest.raises(WorkerUnavailable):
        await anext(late)


def test_an_event_loop_that_ends_does_not_take_the_engine_along(small: Engine) -> None:
    for number in range(3):
        chunks = small.generate(
            request_for(small, turn(f"Loop {number}."), max_tokens=200, sampling=without_end(small))
        )
        asyncio.run(until_text(chunks))
    assert asyncio.run(generate(small, turn("Still there?"))).tokens


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"backend_extra_args": {"n_bach": 512}}, ["backend_extra_args.n_bach", "n_batch"]),
        ({"backend_extra_args": {"n_batch": "many"}}, ["backend_extra_args.n_batch", "integer"]),
        ({"backend_extra_args": {"n_batch": 1}}, ["backend_extra_args.n_batch", "32"]),
        (
            {"backend_extra_args": {"n_batch": 32}, "max_concurrent_requests": 33},
            ["backend_extra_args.n_batch", "max_concurrent_requests", "33"],
        ),
        ({"max_concurrent_requests": 1000}, ["max_concurrent_requests", "240"]),
        ({"eos_token_list": ["no single token"]}, ["eos_token_list", "no single token"]),
        ({"cache_quant": "Q8", "backend_extra_args": {"flash_attn": False}}, ["cache_quant", "flash_attn"]),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(
    smollm2_path: Path, keys: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(smollm2_path, **keys)
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    "keys", [{"gpus": [8, 8]}, {"backend_extra_args": {"n_gpu_layers": 10}}], ids=["gpus", "layers"]
)
def test_a_build_without_gpus_refuses_what_needs_one(
    smollm2_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gallama.engines.llama_cpp.bindings.supports_gpus", lambda: False)
    with pytest.raises(InvalidConfig, match="no GPU support"):
        load(smollm2_path, **keys)


def test_a_file_that_is_no_model_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("These are notes.")
    with pytest.raises(ModelLoadFailed, match=re.escape(str(path))):
        load(path)
