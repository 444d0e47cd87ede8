"""What becomes of answers that nobody reads, that break, or whose model is closed."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from gallama.errors import GallamaError, NotEnoughMemory, WorkerUnavailable
from gallama.generation import Engine, SamplingSettings
from tests.engines.asking import Observed, until_idle
from tests.engines.exllamav2.asking import (
    CALL_SCHEMA,
    ENDLESS,
    NOISE,
    POISON,
    SLOTS,
    Pause,
    Start,
    expected,
    generate,
    generate_all,
    is_call,
    is_poisoned,
    is_step,
    loaded,
    make_prompts,
    raising,
    written,
)
from tests.engines.exllamav2.ground import (
    PAGE,
    Ground,
    Pass,
)


async def test_an_answer_that_nobody_reads_frees_its_pages_in_the_middle_of_its_prompt(
    ground: Ground, folder: Path
) -> None:
    async with loaded(ground, folder, backend_extra_args={"max_chunk_size": PAGE}) as engine:
        pause = Pause(ground, lambda one: one.is_prompt)
        task = asyncio.create_task(generate(engine, [7] * 1000, max_tokens=20))
        await pause.reached()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        pause.end()
        await until_idle(engine)
        assert ground.referenced_pages() == 0
        assert len(ground.steps) == 0
        assert engine.status().cached_tokens == PAGE, "what was read may be of use"


async def test_an_answer_that_nobody_reads_leaves_the_others_alone(ground: Ground, engine: Engine) -> None:
    prompts = make_prompts(3)
    others = asyncio.create_task(generate_all(engine, prompts, max_tokens=60))
    pause = Pause(ground, lambda one: is_step(one) and len(one.texts) == SLOTS)
    task = asyncio.create_task(generate(engine, [7] * 300, max_tokens=500))
    await pause.reached()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    pause.end()
    assert [answer.text for answer in await others] == expected(ground, engine, prompts, 60)
    await until_idle(engine)
    assert ground.referenced_pages() == 0


async def test_a_request_that_waits_may_be_given_up(ground: Ground, engine: Engine) -> None:
    pause = Pause(ground, is_step)
    prompts = [[n] for n in range(5, 5 + SLOTS)]
    running = asyncio.create_task(generate_all(engine, prompts, max_tokens=30))
    await pause.reached()
    waiting = asyncio.create_task(generate(engine, [99] * 10))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    pause.end()
    assert [answer.text for answer in await running] == expected(ground, engine, prompts, 30)
    await until_idle(engine)
    assert not any(text[0] == 99 for one in ground.passes for text in one.texts)


async def test_cancelling_at_any_moment_frees_all(ground: Ground, folder: Path, draft_folder: Path) -> None:
    rng = random.Random(0)
    async with loaded(ground, folder, draft_model_id=str(draft_folder), cache_size=8 * PAGE) as engine:
        tasks = [asyncio.create_task(generate(engine, prompt, max_tokens=500)) for prompt in make_prompts(12)]
        for task in tasks:
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until_idle(engine)
        assert ground.referenced_pages() == 0
        assert (await generate(engine, [5, 6])).text == written(engine, ground.greedy([5, 6], 30))


@pytest.mark.parametrize("settings", [{}, {"speculative": "ngram"}], ids=["plain", "ngram"])
@pytest.mark.parametrize("is_prompt", [False, True], ids=["in a step", "in a prompt"])
async def test_a_pass_that_breaks_once_loses_no_answer(
    ground: Ground, folder: Path, settings: dict[str, Any], is_prompt: bool
) -> None:
    prompts = make_prompts(6)
    async with loaded(ground, folder, **settings) as engine:
        seen = 0

        def is_meant(one: Pass) -> bool:
            nonlocal seen
            seen += one.is_prompt == is_prompt
            return seen == 4

        ground.before_pass = raising(RuntimeError("a kernel broke"), is_meant)
        answers = await generate_all(engine, prompts, max_tokens=30)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 30)
        assert all(answer.sampled == 30 for answer in answers)
        await until_idle(engine)
        assert ground.referenced_pages() == 0


async def test_a_pass_that_breaks_once_changes_no_answer_that_has_a_seed(
    ground: Ground, engine: Engine
) -> None:
    sampling = SamplingSettings(temperature=1, seed=1, logit_bias=ENDLESS.logit_bias)
    prompts = make_prompts(4)
    undisturbed = [(await generate(engine, prompt, sampling=sampling)).text for prompt in prompts]
    ground.before_pass = raising(RuntimeError("a kernel broke"), lambda one: len(one.texts[0]) % 10 == 0)
    answers = await generate_all(engine, prompts, sampling=sampling)
    assert [answer.text for answer in answers] == undisturbed


async def test_a_step_that_breaks_after_tokens_were_chosen_loses_no_answer(
    ground: Ground, engine: Engine
) -> None:
    """Of some texts the library has booked the token by then, of others it has not."""
    prompts = make_prompts(4)
    calls = 0

    def before_token(_: list[int]) -> None:
        nonlocal calls
        calls += 1
        if calls in (30, 75):
            raise AssertionError("a page is not as it should be")

    ground.before_token = before_token
    answers = await generate_all(engine, prompts, max_tokens=40, logprobs=0)
    assert calls > 75
    assert [answer.text for answer in answers] == expected(ground, engine, prompts, 40)
    for answer in answers:
        assert answer.sampled == sum(len(chunk.logprobs) for chunk in answer.chunks) == 40


async def test_a_pass_that_breaks_once_loses_no_answer_of_a_grammar(
    ground: Ground, engine: Engine, start: Start
) -> None:
    states = [Observed(start("json_schema", CALL_SCHEMA)) for _ in range(4)]
    ground.before_pass = raising(
        RuntimeError("a kernel broke"), lambda one: is_step(one) and len(one.texts) > 2
    )
    answers = await asyncio.gather(
        *(
            generate(engine, [5 + n], max_tokens=100, state=state, sampling=NOISE)
            for n, state in enumerate(states)
        )
    )
    for answer, state in zip(answers, states, strict=True):
        assert is_call(json.loads(answer.text))
        assert answer.sampled + answer.forced == len(state.taken)


@pytest.mark.parametrize("is_prompt", [False, True], ids=["in each step", "in its prompt"])
async def test_a_text_that_always_breaks_fails_alone(ground: Ground, engine: Engine, is_prompt: bool) -> None:
    prompts = make_prompts(6)
    ground.before_pass = raising(
        RuntimeError("a kernel broke"),
        lambda one: one.is_prompt == is_prompt and any(map(is_poisoned, one.texts)),
        times=1000,
    )
    others = asyncio.create_task(generate_all(engine, prompts, max_tokens=30))
    with pytest.raises(GallamaError):
        await generate(engine, [*POISON, 8, 9])
    assert [answer.text for answer in await others] == expected(ground, engine, prompts, 30)
    await until_idle(engine)
    assert ground.referenced_pages() == 0
    ground.before_pass = None
    assert (await generate(engine, [5, 6])).text == written(engine, ground.greedy([5, 6], 30))


async def test_a_text_for_which_memory_is_too_small_is_told_so(ground: Ground, engine: Engine) -> None:
    ground.before_pass = raising(
        torch.OutOfMemoryError("CUDA out of memory."),
        lambda one: any(map(is_poisoned, one.texts)),
        times=1000,
    )
    with pytest.raises(NotEnoughMemory):
        await generate(engine, [*POISON, 8, 9])
    assert (await generate(engine, [5, 6])).text == written(engine, ground.greedy([5, 6], 30))


@pytest.mark.parametrize("constrained", [False, True])
async def test_a_text_of_which_no_numbers_are_computed_fails_alone(
    ground: Ground, engine: Engine, start: Start, constrained: bool
) -> None:
    def spoil(one: Pass, logits: torch.Tensor) -> None:
        for row, text in enumerate(one.texts):
            if is_poisoned(text) and len(text) > 8:
                logits[row] = math.nan

    ground.change_logits = spoil
    prompts = make_prompts(3)
    others = asyncio.create_task(generate_all(engine, prompts, max_tokens=30))
    state = start("regex", "[a-z]{30}") if constrained else None
    with pytest.raises(GallamaError):
        await generate(engine, [*POISON, 8], state=state)
    assert [answer.text for answer in await others] == expected(ground, engine, prompts, 30)
    await until_idle(engine)
    assert ground.referenced_pages() == 0


@pytest.mark.parametrize("settings", [{}, {"speculative": "ngram"}], ids=["plain", "ngram"])
async def test_one_text_may_fill_the_whole_cache(
    ground: Ground, folder: Path, settings: dict[str, Any]
) -> None:
    prompt = [random.Random(3).randrange(3, 400) for _ in range(500)]
    async with loaded(ground, folder, max_seq_len=512, cache_size=512, **settings) as engine:
        answers = await generate_all(engine, [prompt, [5, 6]], max_tokens=12)
        assert [answer.text for answer in answers] == expected(ground, engine, [prompt, [5, 6]], 12)


async def test_a_gpu_that_is_lost_ends_all_answers_and_fails_every_probe(
    ground: Ground, folder: Path
) -> None:
    async with loaded(ground, folder) as engine:

        def before_pass(one: Pass) -> None:
            if ground.cuda_error is None and len(one.texts) > 2:
                ground.cuda_error = RuntimeError("CUDA error: an illegal memory access was encountered")
            if ground.cuda_error is not None:
                raise ground.cuda_error

        ground.before_pass = before_pass
        answers = await asyncio.gather(
            *(generate(engine, prompt, max_tokens=500) for prompt in make_prompts(8)), return_exceptions=True
        )
        assert all(isinstance(answer, GallamaError) for answer in answers)
        for _ in range(2):
            with pytest.raises(GallamaError):
                await engine.probe()
            with pytest.raises(GallamaError):
                await generate(engine, [5, 6])


async def test_a_probe_tells_whether_a_token_can_be_computed(ground: Ground, folder: Path) -> None:
    async with loaded(ground, folder) as engine:
        await generate(engine, [7] * 300, max_tokens=5)
        await until_idle(engine)
        cached = engine.status().cached_tokens
        await engine.probe()
        assert engine.status().cached_tokens == cached
        ground.before_pass = raising(RuntimeError("the GPU is gone"), lambda _: True)
        with pytest.raises(GallamaError):
            await engine.probe()
        await engine.probe()
        ground.passes.clear()
        again = await generate(engine, [7] * 300, max_tokens=5)
        assert again.cached >= PAGE, "the probe has left the cache alone"


async def test_a_probe_fails_where_no_numbers_are_computed(ground: Ground, engine: Engine) -> None:
    ground.change_logits = lambda _, logits: logits.fill_(math.nan)
    with pytest.raises(GallamaError):
        await engine.probe()


async def test_the_library_is_called_from_one_thread(
    ground: Ground, folder: Path, draft_folder: Path
) -> None:
    async with loaded(ground, folder, draft_model_id=str(draft_folder)) as engine:
        ground.before_pass = raising(RuntimeError("a kernel broke"), is_step)
        tasks = [asyncio.create_task(generate(engine, prompt)) for prompt in make_prompts(8)]
        tasks[5].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.probe()
    assert len(ground.threads) == 1
    assert threading.get_ident() not in ground.threads


async def test_closing_ends_the_answers_under_way_in_an_error(ground: Ground, folder: Path) -> None:
    async with loaded(ground, folder) as engine:
        pause = Pause(ground, is_step)
        tasks = [asyncio.create_task(generate(engine, prompt, max_tokens=500)) for prompt in make_prompts(8)]
        await pause.reached()
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0.01)
        pause.end()
        await closing
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(answer, WorkerUnavailable) for answer in answers)
        with pytest.raises(WorkerUnavailable):
            await generate(engine, [5])


async def test_closing_gives_all_memory_back(ground: Ground, folder: Path, draft_folder: Path) -> None:
    before = set(threading.enumerate())
    async with loaded(ground, folder, draft_model_id=str(draft_folder)) as engine:
        await generate_all(engine, make_prompts(5))
        generator, cache = ground.generators[-1], weakref.ref(ground.generator.cache)
    # Nothing that a later collection of garbage gives back: PyTorch's own memory is emptied before that.
    assert ground.unloads == 2
    assert generator() is None
    assert cache() is None
    assert not [thread for thread in set(threading.enumerate()) - before if "asyncio" not in thread.name]


async def test_the_totals_are_told(ground: Ground, folder: Path, start: Start) -> None:
    async with loaded(ground, folder) as engine:
        answer = await generate(
            engine, [5], max_tokens=60, state=start("json_schema", CALL_SCHEMA), sampling=NOISE
        )
        await until_idle(engine)
        status = engine.status()
        assert (status.sampled_tokens, status.forced_tokens) == (answer.sampled, answer.forced)
        assert status.steps >= answer.sampled


async def test_a_model_that_does_not_fit_is_told_as_such_and_leaves_nothing_behind(
    ground: Ground, folder: Path
) -> None:
    ground.free_bytes = 100_000
    before = set(threading.enumerate())
    with pytest.raises(NotEnoughMemory):
        async with loaded(ground, folder):
            pass
    assert set(threading.enumerate()) <= before


async def test_a_model_that_computes_no_numbers_is_not_served(ground: Ground, folder: Path) -> None:
    ground.change_logits = lambda _, logits: logits.fill_(math.nan)
    with pytest.raises(GallamaError):
        async with loaded(ground, folder):
            pass
    assert ground.unloads == 1


async def test_a_load_that_breaks_half_way_gives_back_what_it_took(
    ground: Ground, folder: Path, draft_folder: Path
) -> None:
    ground.load_error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(NotEnoughMemory):
        async with loaded(ground, folder, draft_model_id=str(draft_folder)):
            pass
    assert ground.unloads == 2
