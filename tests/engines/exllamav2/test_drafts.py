"""Tokens that are guessed ahead change nothing but the number of steps."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gallama.generation import Engine, SamplingSettings
from tests.engines.asking import Observed, until_idle
from tests.engines.exllamav2.asking import (
    NOISE,
    Start,
    expected,
    generate,
    generate_all,
    loaded,
    make_prompts,
    raising,
    written,
)
from tests.engines.exllamav2.ground import CONTEXT_LENGTH, Ground, Pass, save_folder


async def test_a_draft_model_changes_nothing_but_the_number_of_steps(
    ground: Ground, folder: Path, draft_folder: Path
) -> None:
    prompts = [[5, 6], [8, 9]]
    async with loaded(ground, folder, draft_model_id=str(draft_folder)) as engine:
        answers = await generate_all(engine, prompts, max_tokens=300)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 300)
    for answer in answers:
        assert (answer.sampled, answer.end) == (300, "length")
        assert 0.3 < answer.accepted / answer.drafted < 0.95
    assert len(ground.steps) < 250


async def test_a_grammar_holds_with_a_draft_model(
    ground: Ground, folder: Path, draft_folder: Path, start: Start
) -> None:
    pattern = "([a-z]{20}, and then ){4}the end"
    async with loaded(ground, folder, draft_model_id=str(draft_folder)) as engine:
        for temperature in (0, 1):
            state = Observed(start("regex", pattern))
            answer = await generate(
                engine, [5], max_tokens=300, state=state, sampling=SamplingSettings(temperature=temperature)
            )
            assert re.fullmatch(pattern, answer.text)
            assert answer.sampled + answer.forced == len(state.taken)
            assert answer.accepted <= answer.drafted


@pytest.mark.parametrize(
    "settings", [{"speculative": "ngram"}, {"speculative": "ngram", "num_draft_tokens": 9}]
)
async def test_drafts_by_what_followed_before_change_nothing(
    ground: Ground, folder: Path, settings: dict[str, Any]
) -> None:
    prompts = [[5], [5, 6], *make_prompts(3)]
    async with loaded(ground, folder, **settings) as engine:
        answers = await generate_all(engine, prompts, max_tokens=60)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 60)
        assert all(answer.accepted <= answer.drafted for answer in answers)


async def test_drafts_reach_no_further_than_the_context(
    ground: Ground, folder: Path, draft_folder: Path
) -> None:
    prompt = [random.Random(3).randrange(3, 400) for _ in range(CONTEXT_LENGTH - 20)]
    for settings in ({"draft_model_id": str(draft_folder)}, {"speculative": "ngram"}):
        async with loaded(ground, folder, **settings) as engine:
            answer = await generate(engine, prompt, max_tokens=20)
            assert answer.text == written(engine, ground.greedy(prompt, 20))
            assert (answer.sampled, answer.end) == (20, "length")


async def test_answers_of_one_token_need_no_draft(ground: Ground, folder: Path, draft_folder: Path) -> None:
    async with loaded(ground, folder, draft_model_id=str(draft_folder)) as engine:
        answers = await generate_all(engine, [[n] for n in range(5, 15)], max_tokens=1)
        assert [answer.text for answer in answers] == expected(ground, engine, [[n] for n in range(5, 15)], 1)


async def test_a_draft_model_that_is_mostly_right_saves_most_steps(
    ground: Ground, folder: Path, tmp_path: Path
) -> None:
    async with loaded(
        ground, folder, draft_model_id=str(save_folder(tmp_path)), num_draft_tokens=7
    ) as engine:
        answer = await generate(engine, [5, 6], max_tokens=160)
        assert answer.text == written(engine, ground.greedy([5, 6], 160))
    assert answer.sampled == 160
    # But for what the draft model does not know: that the answer may not end, and ids without a token.
    assert len(ground.steps) < 160 / 4
    assert answer.accepted > 0.6 * answer.drafted


async def test_a_draft_model_that_is_always_wrong_costs_no_token(
    ground: Ground, folder: Path, tmp_path: Path
) -> None:
    path = save_folder(tmp_path, disagrees_every=1)
    async with loaded(ground, folder, draft_model_id=str(path)) as engine:
        answer = await generate(engine, [5, 6], max_tokens=60)
        assert answer.text == written(engine, ground.greedy([5, 6], 60))
    assert len(ground.steps) == 60
    assert answer.accepted == 0
    assert answer.drafted > 100


async def test_many_texts_at_once_have_shorter_drafts_and_few_have_long_ones_again(
    ground: Ground, folder: Path, draft_folder: Path
) -> None:
    settings = {"max_concurrent_requests": 12, "draft_model_id": str(draft_folder)}
    async with loaded(ground, folder, **settings) as engine:
        long = asyncio.create_task(generate(engine, [5, 6], max_tokens=200))
        prompts = [[n, n] for n in range(7, 18)]
        answers = await generate_all(engine, prompts, max_tokens=20)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 20)
        assert (await long).text == written(engine, ground.greedy([5, 6], 200))
    assert min(one.length for one in ground.steps) < 4
    assert ground.steps[-1].length == 5


async def test_what_is_drafted_and_accepted_is_told_and_adds_up(
    ground: Ground, folder: Path, draft_folder: Path
) -> None:
    async with loaded(ground, folder, draft_model_id=str(draft_folder)) as engine:
        answers = await generate_all(engine, make_prompts(3), max_tokens=50)
        await until_idle(engine)
        status = engine.status()
    assert status.drafted_tokens == sum(answer.drafted for answer in answers)
    assert status.accepted_draft_tokens == sum(answer.accepted for answer in answers)
    # Each step of a text gives a token of its own beside those that were guessed.
    steps_of_texts = sum(len(one.texts) for one in ground.steps)
    assert status.sampled_tokens == steps_of_texts + status.accepted_draft_tokens


RUN = "FIXEDINMIDST"


async def test_a_short_forced_run_is_checked_in_few_steps_and_is_no_draft(
    ground: Ground, folder: Path, start: Start
) -> None:
    state = Observed(start("regex", f"(a|b){RUN}(c|d)"))
    async with loaded(ground, folder) as engine:
        answer = await generate(engine, [5, 6, 7], max_tokens=100, state=state, sampling=NOISE)
    assert answer.forced == len(RUN)
    assert len(ground.steps) <= 5
    assert (answer.drafted, answer.accepted) == (0, 0)


async def test_a_forced_run_takes_the_place_of_guesses(ground: Ground, folder: Path, start: Start) -> None:
    """Of a draft model that is wrong each time, so that nothing behind the run is worth a look."""
    state = Observed(start("regex", f"(a|b){RUN}(c|d)"))
    settings = {"draft_model_id": str(folder), "num_draft_tokens": 4}
    async with loaded(ground, folder, **settings) as engine:
        ground.change_logits = drafting(engine, "z")
        answer = await generate(engine, [5, 6, 7], max_tokens=100, state=state, sampling=NOISE)
    assert answer.forced == len(RUN)
    assert len(ground.steps) <= 6
    assert answer.accepted == 0
    assert answer.drafted <= 4 * answer.sampled


async def test_forced_tokens_that_were_guessed_do_not_count_as_accepted(
    ground: Ground, folder: Path, start: Start
) -> None:
    """The draft model knows the run, and is wrong wherever there is a choice."""
    state = Observed(start("regex", f"(a|b){RUN}(c|d)"))
    settings = {"draft_model_id": str(folder), "num_draft_tokens": 4}
    async with loaded(ground, folder, **settings) as engine:
        ground.change_logits = drafting(engine, f"z{RUN}z")
        answer = await generate(engine, [5, 6, 7], max_tokens=100, state=state, sampling=NOISE)
    assert answer.forced == len(RUN)
    assert answer.accepted == 0
    assert 0 < answer.drafted <= 4 * answer.sampled


def drafting(engine: Engine, answer: str) -> Callable[[Pass, torch.Tensor], None]:
    """A draft model that guesses an answer behind a prompt of three tokens, letter by letter."""
    token_ids = [engine.vocabulary.tokens.index(letter.encode()) for letter in answer]

    def change_logits(one: Pass, logits: torch.Tensor) -> None:
        if one.is_of_draft_model:
            for row, text in enumerate(one.texts):
                place = min(len(text) - 3, len(token_ids) - 1)
                logits[row, -1, token_ids[place]] = 100

    return change_logits


async def test_a_draft_model_that_breaks_once_loses_no_answer(
    ground: Ground, folder: Path, draft_folder: Path
) -> None:
    prompts = make_prompts(5)
    async with loaded(ground, folder, draft_model_id=str(draft_folder)) as engine:
        ground.before_pass = raising(
            RuntimeError("a kernel broke"), lambda one: one.is_of_draft_model and len(one.texts) > 2
        )
        answers = await generate_all(engine, prompts, max_tokens=40)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 40)
