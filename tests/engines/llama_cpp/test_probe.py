"""A token for nobody: the real model computes it, and keeps all that it had."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from gallama.config import ModelSpec
from gallama.engines.llama_cpp import LlamaCppEngine, load
from gallama.errors import GallamaError, WorkerUnavailable
from gallama.generation import GenerationRequest, SamplingSettings


def spec_for(path: Path, **settings: object) -> ModelSpec:
    return ModelSpec.model_validate({"model_id": str(path), "max_seq_len": 512, **settings})


@pytest.fixture(params=["cells of all", "cells of each"], scope="module")
def engine(request: pytest.FixtureRequest, smollm2_path: Path) -> Iterator[LlamaCppEngine]:
    shared = {"kv_unified": request.param == "cells of all"}
    engine = load(
        spec_for(smollm2_path, max_concurrent_requests=2, cache_size=1024, backend_extra_args=shared),
        smollm2_path,
    )
    yield engine
    asyncio.run(engine.close())


async def cached_of(engine: LlamaCppEngine, text: str) -> int:
    """Answer a prompt; how many of its tokens were not computed again."""
    request = GenerationRequest(
        prompt_token_ids=engine.tokenize(text), max_tokens=3, sampling=SamplingSettings(temperature=0)
    )
    async with aclosing(engine.generate(request)) as chunks:
        return sum([chunk.cached_prompt_tokens async for chunk in chunks])


async def test_it_is_a_step_and_keeps_what_was_cached(engine: LlamaCppEngine) -> None:
    texts = ["One two three four five six seven. " * 20, "Red green blue white black yellow. " * 20]
    for text in texts:
        await cached_of(engine, text)
    before = engine.status()
    for _ in range(20):
        await engine.probe()
    after = engine.status()
    assert (after.steps - before.steps, after.cached_tokens) == (20, before.cached_tokens)
    assert (after.busy_slots, after.waiting, after.sampled_tokens) == (0, 0, before.sampled_tokens)
    for text in texts:
        assert await cached_of(engine, text) > 100


async def test_beside_answers_it_is_done_with_their_next_step(engine: LlamaCppEngine) -> None:
    request = GenerationRequest(
        prompt_token_ids=engine.tokenize("Once upon a time"), max_tokens=60, sampling=SamplingSettings()
    )
    async with aclosing(engine.generate(request)) as chunks:
        await anext(chunks)
        await asyncio.wait_for(engine.probe(), 10)


async def test_the_steps_of_a_prompt_and_of_an_answer_are_counted(engine: LlamaCppEngine) -> None:
    before = engine.status().steps
    await cached_of(engine, "Something that was not said before")
    assert engine.status().steps >= before + 3


async def test_who_waits_no_more_does_no_harm(engine: LlamaCppEngine) -> None:
    probing = asyncio.create_task(engine.probe())
    await asyncio.sleep(0)
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    await engine.probe()


async def test_what_computes_no_numbers_is_found_out_and_answers_go_on(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(engine._context, "logits", lambda _: np.full(10, np.nan, dtype=np.float32))
        with pytest.raises(GallamaError, match="no numbers"):
            await engine.probe()
    await engine.probe()
    await cached_of(engine, "And on it goes")


async def test_an_engine_that_was_closed_says_so(smollm2_path: Path) -> None:
    engine = load(spec_for(smollm2_path), smollm2_path)
    await engine.close()
    with pytest.raises(WorkerUnavailable):
        await engine.probe()


async def test_the_part_that_is_loaded_grows_to_all_of_the_weights(smollm2_path: Path) -> None:
    told: list[float] = []
    engine = load(spec_for(smollm2_path), smollm2_path, told.append)
    await engine.close()
    assert told == sorted(told)
    assert len(told) > 10
    assert 0.9 < told[-1] < 1
