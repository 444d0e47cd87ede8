"""How texts take turns: who reads, who writes, and when a text begins a new leg."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
import torch

from gallama.engines.exllamav2.options import LEG_TOKENS
from gallama.generation import Engine
from tests.engines.exllamav2.asking import NOISE, Start, generate, generate_all, loaded, written
from tests.engines.exllamav2.ground import PAGE, Ground


async def test_prompts_are_read_one_after_the_other_while_others_write(ground: Ground, folder: Path) -> None:
    prompts = [[first] + [7] * 799 for first in range(10, 14)]
    async with loaded(ground, folder, backend_extra_args={"max_chunk_size": PAGE}) as engine:
        answers = await generate_all(engine, prompts, max_tokens=30)
        expected = [written(engine, ground.greedy(prompt, 30)) for prompt in prompts]
    assert [answer.text for answer in answers] == expected
    in_a_row = [
        len(list(run)) for is_prompt, run in groupby(ground.passes, lambda one: one.is_prompt) if is_prompt
    ]
    # The first is read while nobody writes; then each piece waits for a step of those that do.
    assert max(in_a_row[1:]) == 1


async def test_a_long_forced_run_is_read_at_once(ground: Ground, engine: Engine, start: Start) -> None:
    fixed = "".join(f"line {number}: {number * 7919} and so on; " for number in range(20))
    state = start("regex", "[a-d]" + fixed.replace(".", r"\.") + "[a-d]")
    answer = await generate(engine, [5, 6, 7], max_tokens=600, state=state, sampling=NOISE)
    assert answer.text[1:-1] == fixed
    assert answer.forced > 100
    assert len(ground.steps) < 12
    assert max(one.length for one in ground.passes if one.is_prompt) > 100


async def test_a_text_goes_on_in_a_new_leg_without_computing_anything_twice(
    ground: Ground, engine: Engine
) -> None:
    answer = await generate(engine, [5, 6, 7], max_tokens=LEG_TOKENS + 50)
    assert answer.text == written(engine, ground.greedy([5, 6, 7], LEG_TOKENS + 50))
    assert ground.prompt_tokens_computed <= 2 + 1


async def test_a_prompt_that_is_read_alone_is_timed_until_the_gpu_is_done(
    ground: Ground, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    async with loaded(ground, folder, backend_extra_args={"max_chunk_size": PAGE}) as engine:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: seen.append("wait"))
        ground.before_pass = lambda one: seen.append("read" if one.is_prompt else "write")
        await generate(engine, [7] * 700, max_tokens=3)
    assert seen[:4] == ["read", "wait", "read", "wait"]
