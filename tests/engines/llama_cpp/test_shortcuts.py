"""What makes the engine fast changes no answer: forced runs, guesses, reuse, either layout of the cache."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from gallama.config import ModelSpec
from gallama.conversation import ConstraintKind
from gallama.engines import ENGINES
from gallama.engines.llama_cpp.context import common_prefix
from gallama.errors import InvalidConfig
from gallama.generation import Engine
from tests.engines.asking import Answer
from tests.engines.llama_cpp.step_costs import LongStepsForNothing
from tests.engines.llama_cpp.test_engine import (
    Grammar,
    generate,
    request_for,
    until_text,
    without_end,
)

SLOTS, LONGEST = 2, 256
ROOM_FOR_ALL = {"max_seq_len": LONGEST, "max_concurrent_requests": SLOTS, "cache_size": SLOTS * LONGEST}
LAYOUTS = {"shared": True, "divided": False}
PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string"},
        "favourite_season": {"enum": ["summer", "winter"]},
        "is_member": {"type": "boolean"},
    },
    "required": ["first_name", "favourite_season", "is_member"],
    "additionalProperties": False,
}
LINE = '{"first_name":"Ada","favourite_season":"winter","is_member":true}\n'
SONG = "A cat sat on a mat, a dog sat on a log, and a frog sat on a rock.\n"
POEM = "The river runs to the sea, the wind runs over the hill, and the night runs after the day.\n"


@dataclass(frozen=True)
class Work:
    prompt: str
    max_tokens: int
    constraint: tuple[ConstraintKind, Any] | None = None


# What llama.cpp computes for a token depends on the batch that the token is in: the logits of this quantized
# model differ by up to 0.7. Here the likeliest token is always ahead of the next by more than that.
COPY_SONG = Work(f"{SONG}{SONG}{SONG}A cat sat on", 16)
COPY_POEM = Work(f"{POEM}{POEM}{POEM}The river runs to the sea, the", 12)
WRITE_JSON = Work(LINE * 4, 40, ("json_schema", PERSON))
WRITE_LINE = Work(SONG * 3, 30, ("regex", r"A cat sat on a (mat|bat), a (dog|hen) sat on a (log|rock)\."))
WORKS = (COPY_SONG, COPY_POEM, WRITE_JSON, WRITE_LINE)
PREFIX = "All of this is known before the question comes, which is short. " * 5


class Engines:
    """Engines by their settings, loaded when they are first asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded: dict[str, Engine] = {}

    def __call__(self, **keys: Any) -> Engine:
        name = json.dumps(keys, sort_keys=True)
        if name not in self._loaded:
            spec = ModelSpec(model_id=str(self._path), **{**ROOM_FOR_ALL, **keys})
            self._loaded[name] = ENGINES["llama_cpp"](spec, self._path)
        return self._loaded[name]

    def with_layout(self, layout: str, **arguments: Any) -> Engine:
        return self(backend_extra_args={"kv_unified": LAYOUTS[layout], **arguments})

    def with_drafts(self, kind: str) -> Engine:
        """The model guesses for itself where a draft model is wanted. As if it paid, on any machine."""
        changes = {"draft_model_id": str(self._path)} if kind == "draft" else {"speculative": kind}
        # With cells of its own an answer is guessed for only while it is alone.
        engine: Any = self(backend_extra_args={"kv_unified": True}, **changes)
        engine._scheduler._cost = LongStepsForNothing()
        return cast(Engine, engine)

    def close(self) -> None:
        for engine in self._loaded.values():
            asyncio.run(engine.close())


@pytest.fixture(scope="module")
def engines(smollm2_path: Path) -> Iterator[Engines]:
    engines = Engines(smollm2_path)
    yield engines
    engines.close()


async def answer(engine: Engine, work: Work) -> Answer:
    state = Grammar(engine)(*work.constraint) if work.constraint else None
    settings = without_end(engine)
    return await generate(engine, work.prompt, max_tokens=work.max_tokens, state=state, sampling=settings)


async def answers_alone(engine: Engine) -> list[str]:
    return [(await answer(engine, work)).text for work in WORKS]


async def answers_together(engine: Engine) -> list[str]:
    """More than there are slots, each work twice."""
    answers = await asyncio.gather(*(answer(engine, work) for work in WORKS + WORKS))
    return [one.text for one in answers]


# Answers


async def test_jumping_forward_changes_no_greedy_text(engines: Engines) -> None:
    slow = await answers_alone(engines.with_layout("shared", jump_forward=False))
    assert slow[2] + "\n" == LINE
    assert slow == await answers_alone(engines.with_layout("shared"))
    assert slow * 2 == await answers_together(engines.with_layout("shared"))


async def test_the_layout_of_the_cache_changes_no_greedy_text(engines: Engines) -> None:
    shared = await answers_alone(engines.with_layout("shared"))
    assert shared == await answers_alone(engines.with_layout("divided"))
    assert shared * 2 == await answers_together(engines.with_layout("divided"))


@pytest.mark.parametrize("kind", ["ngram", "draft"])
async def test_guessing_ahead_changes_no_greedy_text(engines: Engines, kind: str) -> None:
    plain = await answers_alone(engines.with_layout("shared"))
    guessing = engines.with_drafts(kind)
    assert plain == await answers_alone(guessing)
    assert plain * 2 == await answers_together(guessing)
    assert guessing.status().accepted_draft_tokens > 0


@pytest.mark.parametrize("kind", ["ngram", "draft"])
async def test_an_answer_says_what_was_guessed_for_it(engines: Engines, kind: str) -> None:
    engine = engines.with_drafts(kind)
    before = engine.status()
    settings = without_end(engine)
    copies = await asyncio.gather(
        *(generate(engine, COPY_SONG.prompt, max_tokens=80, sampling=settings) for _ in range(2))
    )
    after = engine.status()
    chunks = [chunk for copy in copies for chunk in copy.chunks]
    drafted = sum(chunk.drafted_tokens for chunk in chunks)
    accepted = sum(chunk.accepted_draft_tokens for chunk in chunks)
    assert drafted == after.drafted_tokens - before.drafted_tokens
    assert accepted == after.accepted_draft_tokens - before.accepted_draft_tokens
    assert 0 < accepted <= drafted


async def test_without_speculation_nothing_is_guessed(engines: Engines) -> None:
    engine = engines.with_layout("shared")
    chunks = (await answer(engine, COPY_SONG)).chunks
    assert all(chunk.drafted_tokens == chunk.accepted_draft_tokens == 0 for chunk in chunks)
    assert engine.status().drafted_tokens == 0


async def test_what_is_forced_is_counted_and_not_sampled(engines: Engines) -> None:
    engine = engines.with_layout("shared")
    before = engine.status()
    jumping = await answer(engine, WRITE_JSON)
    after = engine.status()
    slow = await answer(engines.with_layout("shared", jump_forward=False), WRITE_JSON)
    assert after.forced_tokens - before.forced_tokens == jumping.forced
    assert after.sampled_tokens - before.sampled_tokens == jumping.sampled
    assert jumping.sampled + jumping.forced == slow.sampled
    assert (jumping.sampled * 2 < slow.sampled, slow.forced) == (True, 0)


# Reuse


async def keep_busy(engine: Engine) -> None:
    """More text than the cache has room for."""
    texts = [
        f"{number} {number} {number}, and other things that nobody asks for again. " for number in range(4)
    ]
    await asyncio.gather(*(generate(engine, text * 8, max_tokens=1) for text in texts))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("others_come", [False, True], ids=["at once", "later"])
async def test_the_next_turn_reads_only_what_is_new(engines: Engines, layout: str, others_come: bool) -> None:
    engine = engines.with_layout(layout)
    first_prompt = f"Turn {layout} {others_come}. {COPY_SONG.prompt}"
    first = await generate(engine, first_prompt, max_tokens=16, sampling=without_end(engine))
    if others_come:
        await keep_busy(engine)
    next_prompt = f"{first_prompt}{first.text} rock.\nA cat sat on"
    second = await generate(engine, next_prompt, max_tokens=12, sampling=without_end(engine))
    # The answer's last token was never computed.
    assert second.cached == len(engine.tokenize(first_prompt + first.text)) - 1
    assert second.text.startswith(" a mat, a dog sat on a log,")


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_without_a_shelf_others_push_a_conversation_out(engines: Engines, layout: str) -> None:
    engine = engines.with_layout(layout, shelf_tokens=0)
    await generate(engine, COPY_SONG.prompt, max_tokens=1)
    await keep_busy(engine)
    assert (await generate(engine, COPY_SONG.prompt, max_tokens=1)).cached == 0


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_prefix_is_taken_over_from_a_request_at_work(engines: Engines, layout: str) -> None:
    engine = engines.with_layout(layout)
    prefix = f"{layout}: {PREFIX}"
    other = request_for(engine, f"{prefix}Write.", max_tokens=100, sampling=without_end(engine))
    async with aclosing(engine.generate(other)) as chunks:
        await until_text(chunks)
        copied = await generate(engine, prefix + COPY_SONG.prompt, max_tokens=16)
        assert engine.status().busy_slots == 1, "the other one is still at work"
    assert copied.cached == common_prefix(
        list(other.prompt_token_ids), engine.tokenize(prefix + COPY_SONG.prompt)
    )
    assert copied.cached > 60
    assert copied.text.startswith(" a mat, a dog sat on a log,")


# Settings


def test_a_cache_that_cannot_be_divided_is_refused_with_the_size_it_needs(engines: Engines) -> None:
    with pytest.raises(InvalidConfig) as raised:
        engines(cache_size=256, backend_extra_args={"kv_unified": False})
    message = str(raised.value.message)
    assert "`backend_extra_args.kv_unified` is false" in message
    assert "needs a `cache_size` of 512" in message
