"""What answers say: that of the model, of its settings, and of their grammars."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from gallama.conversation import ConstraintKind
from gallama.errors import GallamaError, UnsupportedValue
from gallama.generation import Engine, SamplingSettings
from tests.engines.asking import Breaking, Observed, until, until_idle
from tests.engines.exllamav2.asking import (
    CALL_SCHEMA,
    ENDLESS,
    GREEDY,
    NOISE,
    SLOTS,
    Start,
    expected,
    generate,
    generate_all,
    is_call,
    loaded,
    make_prompts,
    written,
)
from tests.engines.exllamav2.ground import (
    CONTEXT_LENGTH,
    END_TOKENS,
    PADDED_BY,
    PAGE,
    Ground,
    Pass,
)


def insisting_on(first: int, second: int) -> Callable[[Pass, torch.Tensor], None]:
    """A model that says the same each time."""

    def change_logits(_: Pass, logits: torch.Tensor) -> None:
        logits[...] = 0
        logits[..., first], logits[..., second] = 5, 4

    return change_logits


def seeded(seed: int) -> SamplingSettings:
    return msgspec.structs.replace(ENDLESS, temperature=1.0, seed=seed)


async def test_a_free_text_is_what_the_model_says(ground: Ground, engine: Engine) -> None:
    prompt = engine.tokenize("The old bridge across the river")
    answer = await generate(engine, prompt, max_tokens=300)
    assert answer.text == written(engine, ground.greedy(prompt, 300))
    assert (answer.sampled, answer.forced, answer.end) == (300, 0, "length")


async def test_texts_at_once_are_what_each_is_alone(ground: Ground, folder: Path) -> None:
    prompts = make_prompts(16)
    async with loaded(ground, folder, max_concurrent_requests=16, cache_size=40 * PAGE) as engine:
        answers = await generate_all(engine, prompts, max_tokens=40)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 40)
    assert max(len(one.texts) for one in ground.steps) == 16


async def test_more_texts_than_slots_and_pages_are_all_answered(ground: Ground, folder: Path) -> None:
    prompts = make_prompts(12)
    async with loaded(ground, folder, cache_size=4 * PAGE) as engine:
        answers = await generate_all(engine, prompts, max_tokens=40)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 40)
        await until_idle(engine)
        assert ground.referenced_pages() == 0
    assert max(len(one.texts) for one in ground.steps) <= SLOTS


async def test_an_answer_of_many_pages_is_one_text(ground: Ground, engine: Engine) -> None:
    prompt = make_prompts(1, longest=40)[0]
    count = CONTEXT_LENGTH - len(prompt)
    answer = await generate(engine, prompt, max_tokens=count)
    assert answer.text == written(engine, ground.greedy(prompt, count))
    assert (answer.sampled, answer.end) == (count, "length")


async def test_long_answers_side_by_side_share_a_small_cache(ground: Ground, folder: Path) -> None:
    prompts = [[5], [6], [7]]
    async with loaded(ground, folder, cache_size=6 * PAGE) as engine:
        answers = await generate_all(engine, prompts, max_tokens=700)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 700)


@pytest.mark.parametrize("length", [1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1])
async def test_a_prompt_may_have_any_length(ground: Ground, engine: Engine, length: int) -> None:
    prompt = [random.Random(length).randrange(3, 400) for _ in range(length)]
    answer = await generate(engine, prompt, max_tokens=10)
    assert answer.text == written(engine, ground.greedy(prompt, 10))


async def test_a_prompt_may_leave_room_for_a_single_token(ground: Ground, engine: Engine) -> None:
    prompt = [random.Random(0).randrange(3, 400) for _ in range(CONTEXT_LENGTH - 1)]
    answer = await generate(engine, prompt, max_tokens=1)
    assert answer.text == written(engine, ground.greedy(prompt, 1))
    assert (answer.sampled, answer.end) == (1, "length")


@pytest.mark.parametrize("end_token", END_TOKENS)
async def test_an_end_token_ends_the_answer_and_is_no_part_of_it(
    ground: Ground, engine: Engine, end_token: int
) -> None:
    def end_after_five(one: Pass, logits: torch.Tensor) -> None:
        if len(one.texts[0]) == 3 + 5:
            logits[..., end_token] = 100

    ground.change_logits = end_after_five
    answer = await generate(engine, [5, 6, 7], sampling=GREEDY)
    assert answer.text == written(engine, ground.greedy([5, 6, 7], 5))
    assert (answer.sampled, answer.end) == (5, "stop")
    await until_idle(engine)
    assert ground.referenced_pages() == 0


async def test_a_character_that_is_cut_off_is_marked_at_the_end(ground: Ground, engine: Engine) -> None:
    half = engine.vocabulary.tokens.index("ü".encode()[:1])

    def say_half_a_character(one: Pass, logits: torch.Tensor) -> None:
        if len(one.texts[0]) == 3 + 4:
            logits[..., half] = 100

    ground.change_logits = say_half_a_character
    answer = await generate(engine, [5, 6, 7], max_tokens=5)
    assert answer.text == written(engine, [*ground.greedy([5, 6, 7], 4), half])
    assert answer.text.endswith("\ufffd")
    assert not any("\ufffd" in chunk.text for chunk in answer.chunks[:-1] if chunk.sampled_tokens == 0)


async def test_ids_without_a_token_are_never_chosen(ground: Ground, engine: Engine) -> None:
    def prefer_padding(_: Pass, logits: torch.Tensor) -> None:
        logits[..., len(engine.vocabulary.tokens) :] = 100

    ground.change_logits = prefer_padding
    answer = await generate(engine, [5, 6, 7])
    assert answer.text == written(engine, ground.greedy([5, 6, 7], 30))
    noise = await generate(engine, [5, 6, 7], sampling=SamplingSettings(temperature=2))
    assert noise.end in ("stop", "length")


@pytest.mark.parametrize(
    ("kind", "source", "holds"),
    [
        ("json_schema", CALL_SCHEMA, lambda text: is_call(json.loads(text))),
        ("regex", "[a-z]{3}-[0-9]{4}", lambda text: re.fullmatch("[a-z]{3}-[0-9]{4}", text)),
        ("regex", "[一-龥]{3}😀[à-ü]{2}", lambda text: re.fullmatch("[一-龥]{3}😀[à-ü]{2}", text)),
        ("choice", ["yes", "no", "perhaps not"], lambda text: text in ("yes", "no", "perhaps not")),
        (
            "grammar",
            {"syntax": "lark", "definition": 'start: ("a" | "bc"){3} "!"'},
            lambda text: re.fullmatch("(a|bc){3}!", text),
        ),
        ("json_object", None, lambda text: isinstance(json.loads(text), dict)),
        ("prefix", ["Dear Sir", "Hello"], lambda text: text.startswith(("Dear Sir", "Hello"))),
        ("regex_prefix", "[0-9]{4}: ", lambda text: re.match("[0-9]{4}: ", text)),
    ],
)
async def test_noise_follows_every_kind_of_grammar(
    engine: Engine, start: Start, kind: ConstraintKind, source: object, holds: Callable[[str], object]
) -> None:
    states = [Observed(start(kind, source)) for _ in range(6)]
    answers = await asyncio.gather(
        *(
            generate(
                engine, [5 + n], max_tokens=120, state=state, sampling=SamplingSettings(temperature=n / 2)
            )
            for n, state in enumerate(states)
        )
    )
    for answer, state in zip(answers, states, strict=True):
        assert answer.text == written(engine, state.taken)
        assert answer.sampled + answer.forced == len(state.taken)
        if answer.end == "stop":
            assert holds(answer.text), answer.text
        else:
            assert len(state.taken) == 120
    if kind not in ("json_object", "prefix", "regex_prefix"):
        assert all(answer.end == "stop" for answer in answers)


async def test_a_forced_beginning_is_read_with_the_prompt(
    ground: Ground, engine: Engine, start: Start
) -> None:
    state = Observed(start("choice", ["one fixed beginning: a", "one fixed beginning: b"]))
    answer = await generate(engine, [5, 6, 7], max_tokens=100, state=state, sampling=NOISE)
    assert answer.text[:-1] == "one fixed beginning: "
    assert answer.forced >= len(state.taken) - 2
    assert len(ground.steps) == answer.sampled
    assert ground.steps[0].texts[0][: 3 + answer.forced] == (5, 6, 7, *state.taken[: answer.forced])


async def test_forced_tokens_are_counted_as_such_wherever_they_stand(engine: Engine, start: Start) -> None:
    source = "(a|b)FIXED IN THE MIDDLE(c|d)AND AT THE END"
    state = Observed(start("regex", source))
    answer = await generate(engine, [5, 6, 7], max_tokens=100, state=state, sampling=NOISE)
    assert re.fullmatch(source, answer.text)
    assert answer.sampled + answer.forced == len(state.taken)
    assert 2 <= answer.sampled <= 4
    assert answer.end == "stop"


@pytest.mark.parametrize("settings", [{}, {"speculative": "ngram"}], ids=["plain", "ngram"])
async def test_forced_tokens_in_the_middle_take_fewer_steps_than_one_each(
    ground: Ground, folder: Path, start: Start, settings: dict[str, Any]
) -> None:
    source = "(a|b)FIXED IN THE MIDDLE AND RATHER LONG(c|d)"
    async with loaded(ground, folder, **settings) as engine:
        state = Observed(start("regex", source))
        answer = await generate(engine, [5, 6, 7], max_tokens=100, state=state, sampling=NOISE)
    assert re.fullmatch(source, answer.text)
    assert len(ground.steps) < len(state.taken) / 2


async def test_a_very_long_forced_run_is_read_like_a_prompt(
    ground: Ground, engine: Engine, start: Start
) -> None:
    run = "".join(random.Random(0).choices("ABCDEFGHIJ", k=300))
    state = Observed(start("regex", f"(a|b){run}(c|d)"))
    others = asyncio.create_task(generate_all(engine, make_prompts(2), max_tokens=40))
    answer = await generate(engine, [5, 6, 7], max_tokens=400, state=state, sampling=NOISE)
    assert answer.text[1:-1] == run
    assert answer.sampled + answer.forced == len(state.taken) > 200
    assert sum(any(text[:3] == (5, 6, 7) for text in one.texts) for one in ground.passes) < 10
    assert [other.text for other in await others] == expected(ground, engine, make_prompts(2), 40)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 17, 40])
async def test_a_limit_may_cut_a_grammar_at_any_token(engine: Engine, start: Start, max_tokens: int) -> None:
    state = start("regex", "(long ){10}[0-9]{30}")
    answer = await generate(engine, [5, 6, 7], max_tokens=max_tokens, state=state, sampling=NOISE)
    assert answer.sampled + answer.forced == max_tokens
    assert answer.end == "length"


async def test_a_grammar_goes_on_over_many_pages(ground: Ground, engine: Engine, start: Start) -> None:
    state = Observed(start("regex", "([a-z]{50}, ){12}end"))
    answer = await generate(engine, [5, 6, 7], max_tokens=1000, state=state, sampling=NOISE)
    assert re.fullmatch("([a-z]{50}, ){12}end", answer.text)
    assert answer.end == "stop"


@pytest.mark.parametrize("part", ["mask", "advance", "forced"])
@pytest.mark.parametrize("after", [0, 5])
async def test_a_grammar_that_breaks_ends_its_answer_alone(
    ground: Ground, engine: Engine, start: Start, part: str, after: int
) -> None:
    prompts = make_prompts(3)
    others = asyncio.create_task(generate_all(engine, prompts, max_tokens=40))
    with pytest.raises(GallamaError):
        await generate(
            engine, [5, 6, 7], state=Breaking(start("regex", "[a-z]{50}"), part, after), sampling=NOISE
        )
    assert [answer.text for answer in await others] == expected(ground, engine, prompts, 40)
    await until_idle(engine)
    assert ground.referenced_pages() == 0


async def test_log_probabilities_are_the_model_s_before_grammar_and_temperature(
    ground: Ground, engine: Engine, start: Start
) -> None:
    state = Observed(start("regex", "[a-z]{4}"))
    answer = await generate(engine, [5, 6, 7], state=state, logprobs=3, sampling=NOISE)
    entries = [entry for chunk in answer.chunks for entry in chunk.logprobs]
    assert [entry.token_id for entry in entries] == state.taken
    for place, entry in enumerate(entries):
        logits = ground.next_logits([5, 6, 7, *state.taken[:place]])[:-PADDED_BY].astype(np.float64)
        logits -= np.log(np.exp(logits).sum())
        # Ids without a token may count among the alternatives' total, or not.
        assert entry.logprob == pytest.approx(logits[entry.token_id], abs=0.15)
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
        for token, value in entry.top:
            if token < len(logits):
                assert value == pytest.approx(logits[token], abs=0.15)


async def test_log_probabilities_come_for_forced_tokens_too(engine: Engine, start: Start) -> None:
    answer = await generate(engine, [5], state=start("choice", ["always this"]), logprobs=0, max_tokens=50)
    entries = [entry for chunk in answer.chunks for entry in chunk.logprobs]
    assert written(engine, [entry.token_id for entry in entries]) == "always this"
    assert all(entry.logprob < 0 for entry in entries)


async def test_log_probabilities_of_prompts_are_refused(engine: Engine) -> None:
    with pytest.raises(UnsupportedValue):
        await generate(engine, [5, 6], logprobs=1, prompt_logprobs=True)


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
async def test_penalties_count_the_answer_and_not_the_prompt(
    ground: Ground, engine: Engine, penalty: str
) -> None:
    ground.change_logits = insisting_on(50, 51)
    sampling = msgspec.structs.replace(ENDLESS, **{penalty: 2.0})
    answer = await generate(engine, [50, 51, 50], max_tokens=2, sampling=sampling)
    assert answer.text == written(engine, [50, 51])


async def test_the_repetition_penalty_counts_the_prompt_too(ground: Ground, engine: Engine) -> None:
    ground.change_logits = insisting_on(50, 51)
    sampling = msgspec.structs.replace(ENDLESS, repetition_penalty=2.0)
    answer = await generate(engine, [50], max_tokens=1, sampling=sampling)
    assert answer.text == written(engine, [51])


async def test_a_seed_makes_the_same_text_again_whoever_else_is_computed(
    ground: Ground, engine: Engine, folder: Path
) -> None:
    alone, other = [await generate(engine, [5, 6, 7], sampling=seeded(seed)) for seed in (1, 2)]
    assert alone.text != other.text
    company = await asyncio.gather(
        generate(engine, [5, 6, 7], sampling=seeded(1)), generate_all(engine, make_prompts(5))
    )
    assert company[0].text == alone.text
    async with loaded(ground, folder, speculative="ngram") as drafting:
        assert (await generate(drafting, [5, 6, 7], sampling=seeded(1))).text == alone.text


async def test_texts_without_a_seed_differ(engine: Engine) -> None:
    texts = {(await generate(engine, [5, 6, 7], sampling=NOISE, max_tokens=20)).text for _ in range(3)}
    assert len(texts) == 3


async def test_the_next_turn_finds_the_last_one_in_the_cache(ground: Ground, folder: Path) -> None:
    async with loaded(ground, folder) as engine:
        prompt = make_prompts(1)[0]
        first = await generate(engine, prompt, max_tokens=300)
        assert first.cached == 0
        turn = [*prompt, *ground.greedy(prompt, 300), 9, 10, 11]
        ground.passes.clear()
        second = await generate(engine, turn, max_tokens=10)
        assert second.text == written(engine, ground.greedy(turn, 10))
        assert second.cached >= (len(turn) - 4) // PAGE * PAGE
        assert second.cached == len(turn) - 1 - ground.prompt_tokens_computed


async def test_the_cache_s_tokens_are_told(ground: Ground, folder: Path) -> None:
    async with loaded(ground, folder) as engine:
        assert engine.status().cached_tokens == 0
        await generate(engine, [7] * 300, max_tokens=10)
        await until_idle(engine)
        assert 300 <= engine.status().cached_tokens <= 311


async def test_equal_requests_at_once_share_what_they_write(ground: Ground, engine: Engine) -> None:
    prompt = make_prompts(1)[0]
    for answer in await generate_all(engine, [prompt] * SLOTS, max_tokens=600):
        assert answer.text == written(engine, ground.greedy(prompt, 600))


@pytest.mark.parametrize("cache_quant", ["FP16", "Q8", "Q6", "Q4"])
async def test_a_cache_of_any_kind_holds_the_texts(ground: Ground, folder: Path, cache_quant: str) -> None:
    prompts = make_prompts(5)
    async with loaded(ground, folder, cache_quant=cache_quant, cache_size=6 * PAGE) as engine:
        answers = await generate_all(engine, prompts, max_tokens=40)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 40)


async def test_prompts_are_read_in_parts_while_others_write(ground: Ground, folder: Path) -> None:
    """A step may take hardly any time, so that of a prompt each has the least part."""
    settings = {"backend_extra_args": {"prompt_step_ms": 1, "max_chunk_size": 1024}}
    async with loaded(ground, folder, **settings) as engine:
        writing = asyncio.create_task(generate(engine, [5, 6], max_tokens=300))
        await until(lambda: len(ground.steps) > 20)
        prompts = [[7, n] * 450 for n in (8, 9)]
        answers = await generate_all(engine, prompts, max_tokens=10)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 10)
        assert (await writing).text == written(engine, ground.greedy([5, 6], 300))
    read = [one for one in ground.passes if one.is_prompt]
    assert max(one.length for one in read) <= PAGE
    for one, following in pairwise(ground.passes):
        assert not (one.is_prompt and following.is_prompt), "those that write go on in each step"


async def test_a_long_history_of_texts_leaves_every_text_right(ground: Ground, folder: Path) -> None:
    """The pages are taken again and again, and put in order in between."""
    async with loaded(ground, folder, cache_size=6 * PAGE) as engine:
        for round_of in range(6):
            prompts = make_prompts(3 + round_of)
            answers = await generate_all(engine, prompts, max_tokens=20)
            assert [answer.text for answer in answers] == expected(ground, engine, prompts, 20)
