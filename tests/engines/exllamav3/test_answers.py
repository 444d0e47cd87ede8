"""What answers say: that of the model, of its settings, and of its grammars."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from gallama.constraints import LLGuidanceBackend
from gallama.conversation import ConstraintKind
from gallama.engines.generators.engine import GeneratorEngine
from gallama.errors import UnsupportedValue
from gallama.generation import SamplingSettings, State
from tests.engines.asking import Answer, Observed, until_idle
from tests.engines.exllamav3.asking import (
    ENDLESS,
    GREEDY,
    ask,
    expect,
    expect_endless,
    prompts,
    request_for,
    start_state,
    text_of,
)
from tests.engines.exllamav3.conftest import LoadEngine
from tests.engines.exllamav3.ground import CONTEXT_LENGTH, PAGE, Ground, save_model

TOOL_CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "look_up_the_weather"},
        "arguments": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "days", "unit"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
# A grammar with a choice, a long run without one, and a choice.
LONG_RUN = "(yes|no) and in front of all the carts of the farmers went an old (dog|cat)"


async def test_a_free_text_is_what_the_model_says(ground: Ground, engine: GeneratorEngine) -> None:
    for length in (1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 77):
        prompt = prompts(1, longest=3 * PAGE)[0][:1] + [(7 * n) % 400 + 3 for n in range(length - 1)]
        answer = await ask(engine, prompt)
        assert answer.text == expect(ground, engine, prompt)
        assert answer.end in ("stop", "length")


async def test_in_company_answers_are_the_same_as_alone(ground: Ground, engine: GeneratorEngine) -> None:
    """More texts than slots, some of which begin as others do."""
    asked = prompts(24, longest=3 * PAGE)
    answers = await asyncio.gather(*(ask(engine, prompt, sampling=ENDLESS) for prompt in asked))
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.text == expect_endless(ground, engine, prompt)
    assert max(texts for texts, _ in ground.forwards) > 8


async def test_texts_wait_for_pages(ground: Ground, load: LoadEngine) -> None:
    """The cache holds one text of full length, and four that are short."""
    engine = load()
    asked = prompts(12, longest=PAGE)
    answers = await asyncio.gather(*(ask(engine, prompt, sampling=ENDLESS) for prompt in asked))
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.text == expect_endless(ground, engine, prompt)


async def test_long_texts_take_turns_where_pages_are_few(ground: Ground, load: LoadEngine) -> None:
    """Each fills most of the cache; one whose leg is over may find its pages taken."""
    engine = load()
    asked = [[n, 9, 9] for n in range(3, 7)]
    answers = await asyncio.gather(
        *(ask(engine, prompt, sampling=ENDLESS, max_tokens=700) for prompt in asked)
    )
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.text == expect_endless(ground, engine, prompt, 700)


@pytest.mark.parametrize("settings", [{}, {"speculative": "ngram", "num_draft_tokens": 30}, {"draft": {}}])
async def test_a_text_may_fill_the_context(
    ground: Ground,
    load: LoadEngine,
    backend: LLGuidanceBackend,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    """What is drafted behind its last tokens has room, too."""
    if "draft" in settings:
        settings = {"draft_model_id": str(save_model(tmp_path, is_draft=True)), "num_draft_tokens": 20}
    engine = load(**settings)
    assert engine.context_length == CONTEXT_LENGTH
    for room in (1, PAGE, PAGE + 1, CONTEXT_LENGTH - 1):
        prompt = [(11 * n) % 300 + 3 for n in range(CONTEXT_LENGTH - room)]
        answer = await ask(engine, prompt, max_tokens=room, sampling=ENDLESS)
        assert (answer.sampled, answer.end) == (room, "length")
        assert answer.text == expect_endless(ground, engine, prompt, room)
        state = Observed(start_state(backend, "regex", "(a|b)(the old bridge ){400}"))
        constrained = await ask(engine, prompt, max_tokens=room, state=state)
        assert (len(state.taken), constrained.end) == (room, "length")


async def test_an_answer_of_several_legs_is_the_same_as_of_one(
    ground: Ground, engine: GeneratorEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gallama.engines.exllamav3 import generator

    prompts_in_company = [[n, 9, 9] for n in range(3, 9)]
    expected = [expect_endless(ground, engine, prompt, 150) for prompt in prompts_in_company]
    for tokens in (1, 100, 512):
        monkeypatch.setattr(generator, "LEG_TOKENS", tokens)
        answers = await asyncio.gather(
            *(ask(engine, prompt, max_tokens=150, sampling=ENDLESS) for prompt in prompts_in_company)
        )
        assert [answer.text for answer in answers] == expected
        assert all(answer.sampled == 150 for answer in answers)


async def test_an_answer_longer_than_a_leg_goes_on_to_its_limit(
    ground: Ground, engine: GeneratorEngine, backend: LLGuidanceBackend
) -> None:
    answer = await ask(engine, [5, 6, 7], max_tokens=1000, sampling=ENDLESS)
    assert answer.sampled == 1000
    assert answer.text == expect_endless(ground, engine, [5, 6, 7], 1000)
    assert ground.tokens_read <= 2, "a leg finds what the one before has computed in whole pages"
    state = Observed(start_state(backend, "regex", "[a-d]{700}"))
    constrained = await ask(engine, [5, 6, 7], max_tokens=1000, state=state)
    assert re.fullmatch("[a-d]{700}", constrained.text)


async def test_a_text_that_ends_says_so_and_leaves_the_end_token_out(
    ground: Ground, engine: GeneratorEngine
) -> None:
    for end in engine.vocabulary.end_token_ids:
        ground.scripts = {(4, 5, 6): [300, 301, 302, end]}
        answer = await ask(engine, [4, 5, 6])
        assert answer.text == text_of(engine.vocabulary, [300, 301, 302])
        assert (answer.sampled, answer.end) == (3, "stop")


async def test_an_unfinished_character_is_told_as_one_that_cannot_be_read(
    ground: Ground, engine: GeneratorEngine
) -> None:
    pieces = [engine.vocabulary.tokens.index(bytes([byte])) for byte in "😀".encode()]
    ground.scripts = {
        (4, 5, 6): [300, *pieces[:2], 2],
        (4, 5, 7): [300, *pieces[:2], 301],
        (4, 5, 8): [300, *pieces],
    }
    begun = engine.vocabulary.tokens[300].decode()
    for logprobs in (None, 0):
        ended = await ask(engine, [4, 5, 6], logprobs=logprobs)
        assert (ended.text, ended.end, ended.sampled) == (begun + "\ufffd", "stop", 3)
        cut = await ask(engine, [4, 5, 7], max_tokens=3, logprobs=logprobs)
        assert (cut.text, cut.end, cut.sampled) == (begun + "\ufffd", "length", 3)
        whole = await ask(engine, [4, 5, 8], max_tokens=5, logprobs=logprobs)
        assert (whole.text, whole.sampled) == (begun + "😀", 5)
        if logprobs is not None:
            assert [len(answer.logprobs) for answer in (ended, cut, whole)] == [3, 3, 5]


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", "[a-z]{3}-[0-9]{4}", "[a-z]{3}-[0-9]{4}"),
        ("regex", "[à-ü]{4}[一-龥]{3}😀", "[à-ü]{4}[一-龥]{3}😀"),
        ("regex", "(a|aa|aaa)b?", "(a|aa|aaa)b?"),
        ("regex", "", ""),
        ("choice", ["yes", "no", "perhaps"], "yes|no|perhaps"),
        ("choice", ["one fixed beginning: a", "one fixed beginning: b"], "one fixed beginning: [ab]"),
        ("grammar", {"syntax": "gbnf", "definition": 'root ::= "x" [0-9]{6} "y"'}, "x[0-9]{6}y"),
        ("regex", LONG_RUN, LONG_RUN),
    ],
)
async def test_a_grammar_holds_on_noise(
    engine: GeneratorEngine, backend: LLGuidanceBackend, kind: ConstraintKind, source: Any, pattern: str
) -> None:
    for temperature in (0, 1, 2):
        for logprobs in (None, 2):
            state = Observed(start_state(backend, kind, source))
            answer = await ask(
                engine,
                "Say it:",
                max_tokens=200,
                state=state,
                sampling=SamplingSettings(temperature=temperature),
                logprobs=logprobs,
            )
            assert answer.end == "stop"
            assert re.fullmatch(pattern, answer.text), answer.text
            assert text_of(engine.vocabulary, state.taken) == answer.text


async def test_a_grammar_holds_whatever_else_is_set(
    engine: GeneratorEngine, backend: LLGuidanceBackend
) -> None:
    """It comes first: what it allows may be unlikely, unwanted and penalized."""
    unwanted = {token: -100.0 for letter in "0123456789-" for token in engine.tokenize(letter)}
    settings: list[dict[str, Any]] = [
        {"top_k": 1},
        {"top_p": 0.01, "temperature": 0.1},
        {"min_p": 0.9, "temperature": 100.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 5.0},
        {"logit_bias": unwanted},
        {"logit_bias": unwanted, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "frequency_penalty": -2.0},
    ]
    answers = await asyncio.gather(
        *(
            ask(
                engine,
                "0123456789-",
                max_tokens=100,
                state=Observed(start_state(backend, "regex", "[0-9]{2}(-[0-9]{4}){3}")),
                sampling=SamplingSettings(**{"temperature": 1.0, **each}),
            )
            for each in settings
        )
    )
    for answer in answers:
        assert re.fullmatch("[0-9]{2}(-[0-9]{4}){3}", answer.text), answer.text


async def test_many_tool_calls_at_once_hold_their_schema(
    engine: GeneratorEngine, backend: LLGuidanceBackend
) -> None:
    answers = await asyncio.gather(
        *(
            ask(
                engine,
                f"Call number {n}:",
                max_tokens=300,
                state=Observed(start_state(backend, "json_schema", TOOL_CALL)),
                sampling=SamplingSettings(temperature=1 + n % 2),
            )
            for n in range(32)
        )
    )
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), TOOL_CALL)
        assert answer.end == "stop"
        assert answer.forced > 0
    assert len({answer.text for answer in answers}) > 1


async def test_a_limit_cuts_a_grammar_at_any_token(
    engine: GeneratorEngine, backend: LLGuidanceBackend
) -> None:
    for max_tokens in (1, 2, 5, 17, 18, 19):
        state = Observed(start_state(backend, "regex", "(long ){10}[0-9]{30}"))
        answer = await ask(engine, "Say it:", max_tokens=max_tokens, state=state)
        assert (answer.sampled + answer.forced, answer.end) == (max_tokens, "length")
        assert len(state.taken) == max_tokens


async def test_tokens_are_counted_as_forced_where_there_was_no_choice(
    engine: GeneratorEngine, backend: LLGuidanceBackend
) -> None:
    """With company, so that some runs are read as drafts and some by a mask with one bit."""

    async def check(number: int) -> None:
        kind, source = ("json_schema", TOOL_CALL) if number % 2 else ("regex", LONG_RUN)
        state = Observed(start_state(backend, kind, source))  # type: ignore[arg-type]
        answer = await ask(engine, f"{number}: say it", max_tokens=300, state=state)
        forced = _forced(start_state(backend, kind, source), state.taken)  # type: ignore[arg-type]
        assert (answer.forced, answer.sampled) == (forced, len(state.taken) - forced)

    await asyncio.gather(*(check(number) for number in range(12)))
    assert engine.status().forced_tokens > 0


def _forced(state: State, taken: list[int]) -> int:
    """How many of the tokens had no other to choose from."""
    count = 0
    place = 0
    while place < len(taken):
        run = state.forced()
        assert taken[place : place + len(run)] == run
        count += len(run)
        step = run or taken[place : place + 1]
        state.advance(step)
        place += len(step)
    return count


async def test_what_is_forced_at_the_start_is_read_with_the_prompt(
    ground: Ground, engine: GeneratorEngine, backend: LLGuidanceBackend
) -> None:
    choices = [f"in front of all of the carts of the farmers went {animal}" for animal in ("a cat", "a dog")]
    state = Observed(start_state(backend, "choice", choices))
    answer = await ask(engine, [17, 18, 19], max_tokens=100, state=state)
    assert answer.forced > 10
    assert len(ground.forwards) <= answer.sampled + 1


async def test_a_forced_run_takes_fewer_steps_than_it_has_tokens(
    ground: Ground, engine: GeneratorEngine, backend: LLGuidanceBackend
) -> None:
    state = Observed(start_state(backend, "regex", LONG_RUN))
    answer = await ask(engine, "And then?", max_tokens=100, state=state)
    assert re.fullmatch(LONG_RUN, answer.text)
    assert answer.forced > 20
    assert len(ground.forwards) < answer.sampled + answer.forced / 4
    assert (answer.drafted, answer.accepted) == (0, 0), "what is certain is no guess"


async def test_log_probabilities_are_those_before_temperature_and_grammar(
    ground: Ground, engine: GeneratorEngine, backend: LLGuidanceBackend
) -> None:
    prompt = [3, 4, 5, 6]
    for state in (None, start_state(backend, "json_schema", TOOL_CALL)):
        answer = await ask(
            engine,
            prompt,
            max_tokens=60,
            logprobs=3,
            state=state,
            sampling=SamplingSettings(temperature=1.5, frequency_penalty=1, logit_bias={0: -1000, 2: -1000}),
        )
        assert answer.forced == 0, "each token is chosen, where its log probability is wanted"
        assert len(answer.logprobs) == answer.sampled
        text = list(prompt)
        for entry in answer.logprobs:
            expected = _log_softmax(ground.logits(text, len(engine.vocabulary.tokens)))
            assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-3)
            best = sorted(expected, reverse=True)[:3]
            assert [value for _, value in entry.top] == pytest.approx(best, abs=1e-3)
            assert [expected[token] for token, _ in entry.top] == pytest.approx(best, abs=1e-3)
            text.append(entry.token_id)
        assert text_of(engine.vocabulary, text[len(prompt) :]) == answer.text


def _log_softmax(logits: np.ndarray[Any, np.dtype[np.float32]]) -> list[float]:
    shifted = logits.astype(np.float64) - logits.max()
    values: list[float] = (shifted - np.log(np.exp(shifted).sum())).tolist()
    return values


async def test_log_probabilities_of_the_prompt_are_refused(engine: GeneratorEngine) -> None:
    with pytest.raises(UnsupportedValue, match="exllamav3"):
        engine.generate(request_for(engine, "Hello", logprobs=1, prompt_logprobs=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"presence_penalty": 9.0},
        {"frequency_penalty": 3.0},
        {"presence_penalty": -2.0, "frequency_penalty": 1.0},
        {"repetition_penalty": 3.0},
        {"repetition_penalty": 1.5, "presence_penalty": 4.0, "logit_bias": {40: 5.0, 2: -1000, 0: -1000}},
    ],
)
async def test_penalties_count_what_they_should(
    ground: Ground, engine: GeneratorEngine, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repetition in prompt and answer, the others in the answer alone, in whichever leg it was written."""
    from gallama.engines.exllamav3 import generator

    monkeypatch.setattr(generator, "LEG_TOKENS", 20)
    sampling = SamplingSettings(temperature=0, **settings)
    prompt = list(range(3, 300))
    expected = _penalized(ground, engine, prompt, sampling, 300)
    answer = await ask(engine, prompt, max_tokens=300, sampling=sampling)
    assert answer.text == text_of(engine.vocabulary, expected)


def _penalized(
    ground: Ground, engine: GeneratorEngine, prompt: list[int], sampling: SamplingSettings, count: int
) -> list[int]:
    size = len(engine.vocabulary.tokens)
    answer: list[int] = []
    while len(answer) < count:
        logits = ground.logits([*prompt, *answer], size)
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        for token in {*prompt, *answer}:
            penalty = sampling.repetition_penalty or 1
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        counts = np.bincount(answer, minlength=size)
        logits -= counts * (sampling.frequency_penalty or 0) + (counts > 0) * (sampling.presence_penalty or 0)
        token = int(logits.argmax())
        if token in engine.vocabulary.end_token_ids:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}]
)
async def test_settings_that_leave_the_likeliest_token_alone_are_greedy(
    ground: Ground, engine: GeneratorEngine, settings: dict[str, Any]
) -> None:
    sampling = SamplingSettings(**{"temperature": 1.0, **settings})
    # In its answer, no two tokens are the likeliest.
    answer = await ask(engine, [8, 8, 9], sampling=sampling)
    assert answer.text == expect(ground, engine, [8, 8, 9])


async def test_only_tokens_that_the_settings_keep_are_chosen(ground: Ground, engine: GeneratorEngine) -> None:
    size = len(engine.vocabulary.tokens)
    for settings in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.9, "min_p": 0.05}):
        sampling = SamplingSettings(temperature=5, logit_bias={0: -1000, 2: -1000}, **settings)
        answer = await ask(engine, [8, 9], sampling=sampling, logprobs=0, max_tokens=60)
        ranks, shares, ratios = [], [], []
        text = [8, 9]
        for entry in answer.logprobs:
            logits = ground.logits(text, size)
            logits[[0, 2]] -= 1000
            weights = np.exp(logits.astype(np.float64) - logits.max())
            ranks.append(int((logits > logits[entry.token_id]).sum()))
            shares.append(weights[logits > logits[entry.token_id]].sum() / weights.sum())
            ratios.append(weights[entry.token_id])
            text.append(entry.token_id)
        assert max(ranks) < settings.get("top_k", size)
        assert max(shares) <= settings.get("top_p", 1)
        assert min(ratios) >= settings.get("min_p", 0) * (1 - 1e-3)
        assert max(ranks) > 0, "there was a choice"


async def test_the_same_seed_says_the_same(engine: GeneratorEngine) -> None:
    async def say(seed: int | None) -> str:
        sampling = SamplingSettings(temperature=1, seed=seed)
        return (await ask(engine, "Once", sampling=sampling, max_tokens=40)).text

    first = [await say(seed) for seed in (1, 2, -1, None, None)]
    assert len(set(first)) == 5
    again = await asyncio.gather(*(say(seed) for seed in (1, 2, -1)))
    assert list(again) == first[:3]


async def test_a_second_turn_finds_the_first_one_in_the_cache(
    ground: Ground, engine: GeneratorEngine
) -> None:
    prompt = [(13 * n) % 350 + 3 for n in range(2 * PAGE + 100)]
    first = await ask(engine, prompt, logprobs=0, sampling=ENDLESS, max_tokens=200)
    assert first.chunks[0].cached_prompt_tokens == 0
    text = [*prompt, *(entry.token_id for entry in first.logprobs)]
    second = await ask(engine, [*text, 7, 8, 9], max_tokens=3)
    # The last token was chosen, and never read.
    assert second.chunks[0].cached_prompt_tokens == len(text) - 1
    assert second.text == expect(ground, engine, [*text, 7, 8, 9], 3)
    assert engine.status().cached_tokens >= 3 * PAGE


@pytest.mark.parametrize(
    "settings",
    [{"cache_quant": "Q8"}, {"cache_quant": "Q4"}, {"backend_extra_args": {"cache_bits": [5, 3]}}],
)
async def test_a_quantized_cache_is_paged_as_any(
    ground: Ground, load: LoadEngine, settings: dict[str, Any]
) -> None:
    engine = load(**settings)
    for prompt in prompts(4, longest=3 * PAGE):
        assert (await ask(engine, prompt)).text == expect(ground, engine, prompt)


@pytest.mark.parametrize(("voice", "is_likely_right"), [(0, True), (1, False)])
async def test_a_draft_model_changes_the_steps_and_not_the_text(
    ground: Ground,
    load: LoadEngine,
    backend: LLGuidanceBackend,
    tmp_path: Path,
    voice: int,
    is_likely_right: bool,
) -> None:
    draft = save_model(tmp_path, voice=voice, is_draft=True)
    engine = load(draft_model_id=str(draft), num_draft_tokens=4, cache_size=8 * CONTEXT_LENGTH)
    ground.forget()
    alone = await ask(engine, [30, 31], max_tokens=100, sampling=ENDLESS)
    assert alone.text == expect_endless(ground, engine, [30, 31], 100)
    assert 0 <= alone.accepted <= alone.drafted
    if is_likely_right:
        assert alone.accepted > 60
        assert len(ground.forwards) < 40
    else:
        assert alone.accepted < 10
        assert alone.drafted > 300
    asked = prompts(12, longest=PAGE)
    states = [Observed(start_state(backend, "regex", LONG_RUN)) if n % 3 == 0 else None for n in range(12)]
    answers = await asyncio.gather(
        *(
            ask(engine, prompt, sampling=ENDLESS, state=state, max_tokens=100)
            for prompt, state in zip(asked, states, strict=True)
        )
    )
    for prompt, state, answer in zip(asked, states, answers, strict=True):
        if state is None:
            assert answer.text == expect_endless(ground, engine, prompt, 100)
        else:
            assert re.fullmatch(LONG_RUN, answer.text)
    totals = engine.status()
    assert totals.drafted_tokens == alone.drafted + sum(answer.drafted for answer in answers)
    assert totals.accepted_draft_tokens == alone.accepted + sum(answer.accepted for answer in answers)


@pytest.mark.parametrize("settings", [{}, {"speculative": "ngram"}])
async def test_a_recurrent_model_s_states_are_those_of_their_texts(
    ground: Ground,
    load: LoadEngine,
    backend: LLGuidanceBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    """It goes on with a text in the middle from a state that was kept, also of another text."""
    engine = load(save_model(tmp_path, is_recurrent=True), cache_size=8 * CONTEXT_LENGTH, **settings)
    from gallama.engines.exllamav3 import generator

    monkeypatch.setattr(generator, "_RECURRENT_LEG_TOKENS", PAGE)
    asked = prompts(8, longest=2 * PAGE)
    answers = await asyncio.gather(
        *(ask(engine, prompt, sampling=ENDLESS, max_tokens=300) for prompt in asked),
        *(
            ask(engine, "Say it:", state=Observed(start_state(backend, "regex", LONG_RUN)), max_tokens=100)
            for _ in range(3)
        ),
    )
    for prompt, answer in zip(asked, answers[:8], strict=True):
        assert answer.text == expect_endless(ground, engine, prompt, 300)
        assert answer.sampled == 300
    assert all(re.fullmatch(LONG_RUN, answer.text) for answer in answers[8:])
    again = await ask(engine, max(asked, key=len), sampling=ENDLESS)
    assert again.text == expect_endless(ground, engine, max(asked, key=len))
    assert again.chunks[0].cached_prompt_tokens >= PAGE


async def test_short_answers_of_a_recurrent_model_share_a_small_cache(
    ground: Ground, load: LoadEngine, tmp_path: Path
) -> None:
    engine = load(save_model(tmp_path, is_recurrent=True), cache_size=8 * PAGE)
    ground.forget()
    await asyncio.gather(*(ask(engine, [5 + n, 7], sampling=ENDLESS, max_tokens=20) for n in range(6)))
    assert max(texts for texts, _ in ground.forwards) == 6


async def test_words_that_stood_there_before_are_guessed(ground: Ground, load: LoadEngine) -> None:
    engine = load(speculative="ngram", cache_size=8 * CONTEXT_LENGTH)
    verse = [(17 * n) % 200 + 50 for n in range(40)]
    prompt = [*verse, 9, 9, *verse[:5]]
    ground.forget()
    ground.scripts = {tuple(prompt): [*verse[5:], 2]}
    answer = await ask(engine, prompt, max_tokens=60)
    assert answer.text == text_of(engine.vocabulary, verse[5:])
    assert answer.accepted > 20
    assert len(ground.forwards) < 20
    others = prompts(5, longest=PAGE)
    answers: list[Answer] = await asyncio.gather(
        *(ask(engine, each, max_tokens=60) for each in [prompt, *others])
    )
    assert answers[0].text == text_of(engine.vocabulary, verse[5:])
    for each, other in zip(others, answers[1:], strict=True):
        assert other.text == expect(ground, engine, each, 60)


async def test_a_probe_computes_a_token_and_leaves_the_cache_as_it_is(
    ground: Ground, engine: GeneratorEngine
) -> None:
    prompt = [(19 * n) % 350 + 3 for n in range(2 * PAGE + 1)]
    first = await ask(engine, prompt, sampling=GREEDY)
    await until_idle(engine)
    before = engine.status()
    ground.forget()
    await engine.probe()
    after = engine.status()
    assert after.steps == before.steps + 1
    assert after.cached_tokens == before.cached_tokens
    assert not ground.forwards
    again = await ask(engine, prompt, sampling=GREEDY)
    assert again.chunks[0].cached_prompt_tokens == 2 * PAGE
    assert again.text == first.text
