"""What becomes of answers when one of them, a step, or all of the model breaks, and when nobody waits."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import weakref
from contextlib import aclosing, suppress
from typing import Any

import pytest
import torch

from gallama.constraints import LLGuidanceBackend
from gallama.engines.generators.engine import GeneratorEngine
from gallama.errors import EngineFailed, GallamaError, NotEnoughMemory, WorkerUnavailable
from gallama.generation import SamplingSettings
from tests.engines.asking import Breaking, Observed, until_idle
from tests.engines.exllamav3.asking import (
    ENDLESS,
    GREEDY,
    ask,
    expect_endless,
    prompts,
    request_for,
    start_state,
    text_of,
)
from tests.engines.exllamav3.conftest import LoadEngine
from tests.engines.exllamav3.ground import CONTEXT_LENGTH, PAGE, Ground

PATTERN = "[a-z]{30}"
POISON = 299
"""A token that a test's step cannot bear."""


class Once:
    """Raises in one step, the n-th in which it is asked."""

    def __init__(self, error: BaseException, *, at: int) -> None:
        self._error = error
        self._left = at

    def __call__(self, _: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error


def hurt_by_poison(error: BaseException) -> Any:
    def check(texts: list[list[int]]) -> None:
        if any(POISON in text for text in texts):
            raise error

    return check


async def ask_all(engine: GeneratorEngine, asked: list[list[int]], **fields: Any) -> list[Any]:
    fields.setdefault("sampling", SamplingSettings(temperature=0, logit_bias={0: -1000, 2: -1000}))
    return await asyncio.gather(*(ask(engine, each, **fields) for each in asked), return_exceptions=True)


async def is_as_new(ground: Ground, engine: GeneratorEngine) -> bool:
    """Whether it computes, and has all of its pages."""
    await until_idle(engine)
    assert ground.pages_in_use == 0
    await engine.probe()
    answer = await ask(engine, [3, 1, 4, 1, 5], sampling=ENDLESS)
    await until_idle(engine)
    return answer.text == expect_endless(ground, engine, [3, 1, 4, 1, 5])


@pytest.mark.parametrize("at", [1, 2, 7])
async def test_a_step_that_breaks_once_loses_no_answer(
    ground: Ground, engine: GeneratorEngine, backend: LLGuidanceBackend, at: int
) -> None:
    asked = prompts(8, longest=PAGE + 50)
    ground.before_forward = Once(RuntimeError("a kernel broke"), at=at)
    state = Observed(start_state(backend, "regex", PATTERN))
    constrained = asyncio.create_task(ask(engine, "Letters:", max_tokens=60, state=state))
    answers = await ask_all(engine, asked)
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.text == expect_endless(ground, engine, prompt)
        assert answer.sampled == 30
    assert re.fullmatch(PATTERN, (await constrained).text)
    assert await is_as_new(ground, engine)


async def test_with_log_probabilities_each_token_is_still_told_once(
    ground: Ground, engine: GeneratorEngine
) -> None:
    ground.before_forward = Once(RuntimeError("a kernel broke"), at=9)
    asked = prompts(4, longest=40)
    for prompt, answer in zip(asked, await ask_all(engine, asked, logprobs=1), strict=True):
        assert answer.text == expect_endless(ground, engine, prompt)
        assert len(answer.logprobs) == answer.sampled == 30


@pytest.mark.parametrize("at", [2, 3, 4, 5])
async def test_what_is_held_back_when_a_step_breaks_is_told_once(
    ground: Ground, engine: GeneratorEngine, at: int
) -> None:
    """The library tells of tokens once characters are whole."""
    pieces = [engine.vocabulary.tokens.index(bytes([byte])) for byte in "😀".encode()]
    prompts_in_company = [[4, 5, 8], [4, 5, 9]]
    ground.scripts = {tuple(each): [300, *pieces, 301, 2] for each in prompts_in_company}
    ground.before_forward = Once(RuntimeError("a kernel broke"), at=at)
    for answer in await ask_all(engine, prompts_in_company, logprobs=0, sampling=GREEDY):
        assert [entry.token_id for entry in answer.logprobs] == [300, *pieces, 301]
        assert answer.text == text_of(engine.vocabulary, [300, *pieces, 301])
        assert (answer.sampled, answer.end) == (6, "stop")


async def test_a_text_that_breaks_every_step_ends_alone(ground: Ground, engine: GeneratorEngine) -> None:
    asked = [[token % POISON for token in prompt] for prompt in prompts(6, longest=40)]
    biased = SamplingSettings(temperature=0, logit_bias={0: -1000, 2: -1000, POISON: -1000})
    expected = [answer.text for answer in await ask_all(engine, asked, sampling=biased)]
    ground.before_forward = hurt_by_poison(RuntimeError("a kernel broke"))
    *others, poisoned = await ask_all(engine, [*asked, [4, POISON, 5]], sampling=biased)
    assert isinstance(poisoned, GallamaError)
    assert [answer.text for answer in others] == expected
    ground.before_forward = None
    assert await is_as_new(ground, engine)


async def test_a_text_for_which_memory_does_not_suffice_says_so(
    ground: Ground, engine: GeneratorEngine
) -> None:
    ground.before_forward = hurt_by_poison(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(NotEnoughMemory):
        await ask(engine, [4, POISON, 5])
    ground.before_forward = None
    assert await is_as_new(ground, engine)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("a kernel broke"), GallamaError),
        (torch.OutOfMemoryError("CUDA out of memory"), NotEnoughMemory),
    ],
)
async def test_a_prompt_that_cannot_be_read_fails_its_text_alone(
    ground: Ground, engine: GeneratorEngine, error: Exception, told: type[GallamaError]
) -> None:
    def check(token_ids: list[int]) -> None:
        if POISON in token_ids:
            raise error

    ground.before_prefill = check
    good, bad = await ask_all(engine, [[4, 5, 6] * 100, [7, POISON, 8] * 100])
    assert isinstance(bad, told)
    assert good.text == expect_endless(ground, engine, [4, 5, 6] * 100)
    ground.before_prefill = None
    assert await is_as_new(ground, engine)


async def test_a_text_without_numbers_behind_it_fails_alone(ground: Ground, engine: GeneratorEngine) -> None:
    ground.is_spoiled = lambda token_ids: token_ids[0] == 55
    asked = [[n, 6, 7] for n in range(50, 54)]
    *others, spoiled = await ask_all(engine, [*asked, [55, 6, 7]])
    assert isinstance(spoiled, GallamaError)
    assert [answer.text for answer in others] == [expect_endless(ground, engine, each) for each in asked]
    assert await is_as_new(ground, engine)


@pytest.mark.parametrize("behind", [0, 5])
async def test_a_grammar_that_breaks_fails_its_text_alone(
    ground: Ground, engine: GeneratorEngine, backend: LLGuidanceBackend, behind: int
) -> None:
    others = [
        asyncio.create_task(
            ask(engine, [n, 9], max_tokens=60, state=Observed(start_state(backend, "regex", PATTERN)))
        )
        for n in range(3, 6)
    ]
    with pytest.raises(GallamaError):
        await ask(engine, [8, 9], state=Breaking(start_state(backend, "regex", PATTERN), "mask", behind))
    assert all(re.fullmatch(PATTERN, answer.text) for answer in await asyncio.gather(*others))
    assert await is_as_new(ground, engine)


@pytest.mark.parametrize(
    "settings", [{"speculative": "ngram"}, {"backend_extra_args": {"prompt_step_ms": 1}}]
)
async def test_texts_go_on_after_a_broken_step_whatever_is_set(
    ground: Ground, load: LoadEngine, settings: dict[str, Any]
) -> None:
    engine = load(**settings, cache_size=8 * CONTEXT_LENGTH)
    asked = prompts(6, longest=PAGE)
    ground.before_forward = Once(RuntimeError("a kernel broke"), at=5)
    for prompt, answer in zip(asked, await ask_all(engine, asked), strict=True):
        assert answer.text == expect_endless(ground, engine, prompt)


async def test_leaving_at_any_moment_gives_all_pages_back(ground: Ground, engine: GeneratorEngine) -> None:
    """While it waits, while its prompt is read, and while it is answered."""
    rng = random.Random(0)
    asked = prompts(40, longest=3 * PAGE)
    tasks = [
        asyncio.create_task(ask(engine, each, max_tokens=200, sampling=ENDLESS, logprobs=n % 2 or None))
        for n, each in enumerate(asked)
    ]
    for task in rng.sample(tasks, len(tasks)):
        await asyncio.sleep(rng.random() * 0.01)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await is_as_new(ground, engine)


async def test_leaving_does_not_touch_the_others(ground: Ground, engine: GeneratorEngine) -> None:
    asked = prompts(12, longest=PAGE)
    staying = [asyncio.create_task(ask(engine, each, sampling=ENDLESS, max_tokens=80)) for each in asked]
    for number in range(12):
        chunks = engine.generate(request_for(engine, [number + 3, 9], sampling=ENDLESS, max_tokens=500))
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.sampled_tokens:
                    break
    for prompt, task in zip(asked, staying, strict=True):
        assert (await task).text == expect_endless(ground, engine, prompt, 80)
    assert await is_as_new(ground, engine)


async def test_leaving_does_not_touch_who_shares_pages(ground: Ground, engine: GeneratorEngine) -> None:
    rng = random.Random(2)
    common = [(23 * n) % 350 + 3 for n in range(2 * PAGE)]
    asked = [[*common[: rng.choice([PAGE, PAGE + 9, 2 * PAGE])], n + 3, 7] for n in range(24)]
    tasks = [asyncio.create_task(ask(engine, each, sampling=ENDLESS, max_tokens=60)) for each in asked]
    leaving = rng.sample(range(24), 12)
    for number in leaving:
        await asyncio.sleep(0.004)
        tasks[number].cancel()
    for number, task in enumerate(tasks):
        if number in leaving:
            await asyncio.gather(task, return_exceptions=True)
        else:
            assert (await task).text == expect_endless(ground, engine, asked[number], 60)
    assert await is_as_new(ground, engine)


async def test_a_model_that_computes_nothing_any_more_does_not_pass_for_alive(
    ground: Ground, engine: GeneratorEngine
) -> None:
    await engine.probe()
    ground.is_spoiled = lambda token_ids: True
    with pytest.raises(GallamaError, match="no numbers"):
        await engine.probe()
    ground.is_spoiled = None
    assert await is_as_new(ground, engine)


async def test_an_engine_whose_generator_cannot_be_made_anew_ends_all_answers_and_fails_its_probe(
    ground: Ground, load: LoadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load()
    asked = prompts(3, longest=30)
    ground.before_forward = Once(RuntimeError("an illegal memory access"), at=3)

    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(ground.library.generator.generator.PageTable, "__init__", fail)
    assert all(isinstance(answer, EngineFailed) for answer in await ask_all(engine, asked))
    with pytest.raises(GallamaError):
        await engine.probe()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Insufficient VRAM in split for model and cache"), NotEnoughMemory),
        (torch.OutOfMemoryError("CUDA out of memory"), NotEnoughMemory),
        (ValueError("No tensors found for lm_head matching supported quantization format."), GallamaError),
    ],
)
def test_a_model_that_does_not_load_says_why(
    ground: Ground, load: LoadEngine, error: Exception, told: type[GallamaError]
) -> None:
    ground.load_error = error
    with pytest.raises(told):
        load()


def test_a_model_that_computes_no_numbers_is_not_taken_for_loaded(ground: Ground, load: LoadEngine) -> None:
    ground.is_spoiled = lambda token_ids: True
    with pytest.raises(GallamaError, match="no numbers"):
        load()


async def test_closing_ends_what_is_under_way_and_gives_the_memory_back(
    ground: Ground, load: LoadEngine
) -> None:
    """Answered texts, and such that wait."""
    engine = load(max_concurrent_requests=2)
    generator = ground.generators[-1]
    model, cache = weakref.ref(generator.model), weakref.ref(generator.cache)
    layers = list(generator.cache.layers.values())
    generator = None
    tasks = [
        asyncio.create_task(ask(engine, [n, 9], sampling=ENDLESS, max_tokens=CONTEXT_LENGTH - 2))
        for n in range(3, 9)
    ]
    probe = asyncio.create_task(engine.probe())
    await asyncio.sleep(0.05)
    await engine.close()
    for task in tasks:
        with pytest.raises(WorkerUnavailable):
            await task
    with suppress(GallamaError):
        await probe
    assert all(layer.k is None for layer in layers)
    del layers
    gc.collect()
    assert model() is None
    assert cache() is None
    with pytest.raises(WorkerUnavailable):
        await ask(engine, [3, 4])


async def test_the_library_is_called_from_one_thread(
    ground: Ground, load: LoadEngine, backend: LLGuidanceBackend
) -> None:
    """From loading over recovery to the end."""
    ground.threads.clear()
    engine = load()
    ground.before_forward = Once(RuntimeError("a kernel broke"), at=4)
    state = Observed(start_state(backend, "regex", PATTERN))
    answers = asyncio.gather(ask(engine, "Letters:", max_tokens=60, state=state), ask(engine, [3, 4]))
    leaving = asyncio.create_task(ask(engine, [3, 4, 5], sampling=ENDLESS, max_tokens=500))
    await asyncio.sleep(0.02)
    leaving.cancel()
    await answers
    await engine.probe()
    engine.status()
    await engine.close()
    assert len(ground.threads) == 1
