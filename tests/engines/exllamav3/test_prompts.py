"""Reading prompts while others write."""

from __future__ import annotations

import asyncio

import pytest

from gallama.engines.generators.engine import GeneratorEngine
from tests.engines.exllamav3.asking import ENDLESS, ask
from tests.engines.exllamav3.conftest import LoadEngine
from tests.engines.exllamav3.ground import Ground

MOST_TOKENS = 768
"""In one step."""


async def pieces_beside_a_writer(ground: Ground, engine: GeneratorEngine, prompts: int) -> list[int]:
    """How prompts are cut that come while another text is written."""
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    ground.before_forward = lambda _: _wake(loop, begun)
    writer = asyncio.create_task(ask(engine, [4, 5], sampling=ENDLESS, max_tokens=900))
    await begun.wait()
    pieces: list[int] = []
    ground.before_prefill = lambda piece: pieces.append(len(piece))
    for first in range(prompts):
        await ask(engine, [10 + first, *range(20, 320), *range(20, 320), *range(20, 320)], max_tokens=1)
    assert not writer.done()
    writer.cancel()
    return pieces


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


@pytest.mark.parametrize(("milliseconds", "longest"), [(1, 256), (60_000, MOST_TOKENS - 256)])
async def test_a_prompt_is_read_in_pieces_that_keep_steps_short(
    ground: Ground, load: LoadEngine, milliseconds: int, longest: int
) -> None:
    engine = load(
        cache_size=8192,
        backend_extra_args={"max_chunk_size": MOST_TOKENS, "prompt_step_ms": milliseconds},
    )
    pieces = await pieces_beside_a_writer(ground, engine, prompts=4)
    assert sum(pieces) == 4 * 900
    assert max(pieces) == longest


async def test_a_prompt_beside_which_nobody_writes_is_read_in_the_largest_pieces(
    ground: Ground, load: LoadEngine
) -> None:
    engine = load(backend_extra_args={"max_chunk_size": MOST_TOKENS, "prompt_step_ms": 1})
    pieces: list[int] = []
    ground.before_prefill = lambda piece: pieces.append(len(piece))
    await ask(engine, [*range(20, 320), *range(20, 320), *range(20, 320)], max_tokens=1)
    assert pieces == [MOST_TOKENS, 899 - MOST_TOKENS]
