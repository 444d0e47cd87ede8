"""Without flash-attn the library computes one text at a time, and keeps the last one only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gallama.errors import GallamaError
from gallama.generation import Engine
from tests.engines.asking import Observed, until_idle
from tests.engines.exllamav2.asking import (
    NOISE,
    POISON,
    Pause,
    Start,
    expected,
    generate,
    generate_all,
    is_poisoned,
    is_step,
    loaded,
    make_prompts,
    raising,
    written,
)
from tests.engines.exllamav2.ground import CONTEXT_LENGTH, PAGE, Ground, laid_ground, save_folder


@pytest.fixture(scope="module")
def laid() -> Iterator[Ground]:
    with laid_ground(has_flash_attention=False) as ground:
        yield ground


async def test_texts_are_answered_one_after_the_other(ground: Ground, engine: Engine) -> None:
    prompts = make_prompts(6)
    answers = await generate_all(engine, prompts, max_tokens=40)
    assert [answer.text for answer in answers] == expected(ground, engine, prompts, 40)
    assert {len(one.texts) for one in ground.steps} == {1}
    await until_idle(engine)
    assert ground.referenced_pages() == 0


async def test_a_text_may_fill_the_context(ground: Ground, engine: Engine) -> None:
    prompt = make_prompts(1, longest=40)[0]
    count = CONTEXT_LENGTH - len(prompt)
    answer = await generate(engine, prompt, max_tokens=count)
    assert answer.text == written(engine, ground.greedy(prompt, count))
    assert (answer.sampled, answer.end) == (count, "length")


async def test_the_next_turn_goes_on_where_the_last_one_ended(ground: Ground, engine: Engine) -> None:
    prompt = make_prompts(1)[0]
    await generate(engine, prompt, max_tokens=20)
    turn = [*prompt, *ground.greedy(prompt, 20), 9, 10]
    ground.passes.clear()
    answer = await generate(engine, turn, max_tokens=10)
    assert answer.text == written(engine, ground.greedy(turn, 10))
    assert answer.cached >= len(prompt)
    assert answer.cached == len(turn) - 1 - ground.prompt_tokens_computed


@pytest.mark.parametrize("drafts_by", ["model", "ngram"])
async def test_drafts_change_nothing(
    ground: Ground, folder: Path, draft_folder: Path, drafts_by: str
) -> None:
    by_model = {"draft_model_id": str(draft_folder)}
    settings: dict[str, Any] = by_model if drafts_by == "model" else {"speculative": "ngram"}
    prompts = make_prompts(3)
    async with loaded(ground, folder, **settings) as engine:
        answers = await generate_all(engine, prompts, max_tokens=60)
        assert [answer.text for answer in answers] == expected(ground, engine, prompts, 60)


async def test_a_grammar_holds(engine: Engine, start: Start) -> None:
    state = Observed(start("regex", "(a|b)FIXED IN THE MIDDLE[a-z]{20}"))
    answer = await generate(engine, [5, 6], max_tokens=100, state=state, sampling=NOISE)
    assert answer.text == written(engine, state.taken)
    assert answer.end == "stop"


async def test_what_breaks_leaves_the_others_alone(ground: Ground, engine: Engine) -> None:
    prompts = make_prompts(3)
    ground.before_pass = raising(
        RuntimeError("a kernel broke"), lambda one: is_step(one) and is_poisoned(one.texts[0]), times=1000
    )
    others = asyncio.create_task(generate_all(engine, prompts))
    with pytest.raises(GallamaError):
        await generate(engine, [*POISON, 8, 9])
    assert [answer.text for answer in await others] == expected(ground, engine, prompts, 30)


async def test_an_answer_that_nobody_reads_makes_room(ground: Ground, folder: Path) -> None:
    async with loaded(ground, folder, backend_extra_args={"max_chunk_size": PAGE}) as engine:
        for is_meant in (is_step, lambda one: one.is_prompt):
            pause = Pause(ground, is_meant)
            task = asyncio.create_task(generate(engine, [7] * 900, max_tokens=100))
            await pause.reached()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            pause.end()
            prompts = make_prompts(2)
            answers = await generate_all(engine, prompts)
            assert [answer.text for answer in answers] == expected(ground, engine, prompts, 30)


@pytest.mark.parametrize("cached", [0, 5])
def test_no_token_sees_those_behind_it(ground: Ground, engine: Engine, cached: int) -> None:
    """The library's own attention, on the CPU."""
    model = ground.generator.model
    config, kind = model.config, ground.exllamav2.attn.ExLlamaV2Attention
    attention = next(module for module in model.modules if isinstance(module, kind))
    generator = torch.Generator().manual_seed(1)

    def noise(length: int, heads: int) -> torch.Tensor:
        return torch.randn(1, length, heads, config.head_dim, generator=generator).half()

    length = 4
    queries = noise(length, config.num_attention_heads)
    keys, values = (noise(cached + length, config.num_key_value_heads) for _ in range(2))

    def attend() -> torch.Tensor:
        params = ground.generator.get_paged_params(
            1, torch.zeros((1, 1), dtype=torch.int32), torch.tensor([cached], dtype=torch.int32), length
        )
        attended: torch.Tensor = attention._attn_torch(
            1, length, queries, keys.clone(), values.clone(), params, config
        )
        return attended

    before = attend()
    keys[:, -1], values[:, -1] = 1, 100
    after = attend()
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


async def test_what_sees_a_long_text_is_read_in_smaller_pieces(ground: Ground, tmp_path: Path) -> None:
    folder = save_folder(tmp_path, max_position_embeddings=32768)
    prompt = make_prompts(1, longest=20_000)[0]
    prompt = [*prompt, *[5] * (20_000 - len(prompt))]
    async with loaded(ground, folder, cache_size=32768) as engine:
        await generate(engine, prompt, max_tokens=2)
        pieces = [one for one in ground.passes if one.is_prompt]
        assert max(one.length for one in pieces) == PAGE
        ground.passes.clear()
        await generate(engine, [9] * 1500, max_tokens=2)
        assert [one.length for one in ground.passes if one.is_prompt] == [1499]
