from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.config import ModelSpec
from gallama.engines import scripted
from gallama.engines.scripted import ScriptedEngine
from gallama.errors import InvalidConfig, ModelLoadFailed
from gallama.generation import (
    EndReason,
    GenerationRequest,
    SamplingSettings,
    State,
    StateStatus,
)

PROMPT = "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nGrüße!<|im_end|>\n<|im_start|>assistant\n"


def make(**arguments: object) -> ScriptedEngine:
    spec = ModelSpec.model_validate(
        {"model_id": "any", "backend": "scripted", "backend_extra_args": arguments}
    )
    return scripted.load(spec, Path("nowhere"))


def request_for(
    engine: ScriptedEngine, prompt: str = PROMPT, *, max_tokens: int = 100, state: State | None = None
) -> GenerationRequest:
    return GenerationRequest(
        prompt_token_ids=engine.tokenize(prompt),
        max_tokens=max_tokens,
        sampling=SamplingSettings(),
        state=state,
    )


async def generate(engine: ScriptedEngine, request: GenerationRequest) -> tuple[str, EndReason | None, int]:
    """Text, why it ended, tokens."""
    async with aclosing(engine.generate(request)) as stream:
        chunks = [chunk async for chunk in stream]
    assert [chunk.end for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    text = "".join(chunk.text for chunk in chunks)
    return text, chunks[-1].end, sum(chunk.sampled_tokens for chunk in chunks)


class OnlyDigits:
    """A grammar of exactly three digits."""

    def __init__(self) -> None:
        self.taken = 0

    @property
    def status(self) -> StateStatus:
        return "must_end" if self.taken == 3 else "running"

    def mask(self, out: NDArray[np.int32]) -> bool:
        out[:] = 0
        out[1] = 0x03FF0000
        return True

    def accepts(self, token_ids: Sequence[int]) -> int:
        raise NotImplementedError

    def advance(self, token_ids: Sequence[int]) -> int:
        assert bytes(token_ids).isdigit()
        self.taken += len(token_ids)
        return len(token_ids)

    def forced(self) -> list[int]:
        return []

    def rollback(self, count: int) -> None:
        raise NotImplementedError

    def clone(self) -> State:
        raise NotImplementedError


async def test_without_a_script_the_last_user_is_echoed() -> None:
    engine = make()
    assert await generate(engine, request_for(engine)) == ("Grüße!", "stop", len("Grüße!".encode()))


async def test_the_script_is_played() -> None:
    engine = make(reply="Hello 😀")
    assert await generate(engine, request_for(engine)) == ("Hello 😀", "stop", len("Hello 😀".encode()))


async def test_a_limit_cuts_the_answer() -> None:
    engine = make(reply="Hello")
    assert await generate(engine, request_for(engine, max_tokens=2)) == ("He", "length", 2)


@pytest.mark.parametrize(("reply", "expected"), [("12345", "123"), ("a", "000"), ("9x", "900")])
async def test_a_grammar_is_obeyed(reply: str, expected: str) -> None:
    engine = make(reply=reply)
    assert await generate(engine, request_for(engine, state=OnlyDigits())) == (expected, "stop", 3)


async def test_control_tokens_are_recognised_in_prompts_only_as_a_whole() -> None:
    engine = make()
    assert engine.tokenize("<|im_start|>a<|im_end") == [256, ord("a"), *b"<|im_end"]


async def test_closing_frees_the_slot() -> None:
    engine = make(slots=1, hang_after_tokens=1)
    stream = engine.generate(request_for(engine))
    assert (await anext(stream)).text == "G"
    assert engine.status().busy_slots == 1
    await stream.aclose()
    assert engine.status().busy_slots == 0


async def test_more_than_the_slots_wait() -> None:
    engine = make(slots=1, reply="ab")
    first = engine.generate(request_for(engine))
    await anext(first)
    second = asyncio.create_task(generate(engine, request_for(engine)))
    await asyncio.sleep(0.01)
    assert engine.status().waiting == 1
    await first.aclose()
    assert (await second)[0] == "ab"


async def test_an_answer_may_fail_in_the_middle() -> None:
    engine = make(reply="abc", raise_after_tokens=2)
    stream = engine.generate(request_for(engine))
    assert [(await anext(stream)).text for _ in range(2)] == ["a", "b"]
    with pytest.raises(RuntimeError, match="after 2 tokens"):
        await anext(stream)
    assert engine.status().busy_slots == 0


async def test_unknown_arguments_are_refused_by_name() -> None:
    with pytest.raises(InvalidConfig, match=r"backend_extra_args\.repli"):
        make(repli="x")
    with pytest.raises(InvalidConfig, match=r"backend_extra_args\.slots"):
        make(slots=0)


async def test_loading_may_fail() -> None:
    with pytest.raises(ModelLoadFailed, match="no memory"):
        make(fail_at_load="no memory")


def test_progress_of_a_load_grows_to_its_end() -> None:
    told: list[float] = []
    spec = ModelSpec.model_validate({"model_id": "any", "backend": "scripted"})
    scripted.load(spec, Path("nowhere"), told.append)
    assert told == sorted(told)
    assert (told[0], len(told)) == (0.0, 100)


async def test_its_steps_are_counted_while_it_answers() -> None:
    engine = make(reply="abc")
    stream = engine.generate(request_for(engine))
    steps = [engine.status().steps]
    async with aclosing(stream):
        steps += [engine.status().steps async for _ in stream]
    assert steps == [0, 1, 2, 3, 4]


async def test_a_probe_is_a_step_and_leaves_no_slot_behind() -> None:
    engine = make(slots=1)
    await engine.probe()
    assert engine.status().steps > 0
    assert engine.status().busy_slots == 0


async def test_a_probe_fails_where_each_answer_does() -> None:
    engine = make(raise_after_tokens=0)
    with pytest.raises(RuntimeError):
        await engine.probe()


async def test_a_prompt_is_scored_where_that_is_asked_for() -> None:
    engine = make(reply="ok")
    request = GenerationRequest(
        prompt_token_ids=engine.tokenize("abc"),
        max_tokens=0,
        sampling=SamplingSettings(),
        logprobs=2,
        prompt_logprobs=True,
    )
    async with aclosing(engine.generate(request)) as stream:
        first, *others = [chunk async for chunk in stream]
    assert [entry and (entry.token_id, len(entry.top)) for entry in first.prompt_logprobs] == [
        None,
        (ord("b"), 2),
        (ord("c"), 2),
    ]
    assert [chunk.end for chunk in others] == ["length"]
