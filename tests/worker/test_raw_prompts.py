"""Prompts without a template: what becomes of them before and around the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gallama.catalog import resolve_model
from gallama.config import ModelSpec, ServerConfig
from gallama.conversation import (
    AnswerText,
    ChatEvent,
    ChatRequest,
    Constraint,
    Explained,
    RawPrompt,
    Reply,
    collect_reply,
)
from gallama.engines import ENGINES
from gallama.engines.scripted import Script, ScriptedEngine
from gallama.errors import ContextLengthExceeded, GallamaError, InvalidRequest, UnsupportedValue
from gallama.generation import Engine, GeneratedChunk, GenerationRequest, InfillTokens, TokenLogprob
from gallama.worker.chat import ChatRunner

SPEC = ModelSpec(model_id="any", prompt_template="hermes")
START, END = 256, 257
INFILL = InfillTokens(prefix=1, suffix=2, middle=3)
CALL = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'


class NotingEngine(ScriptedEngine):
    """Notes what it is asked for."""

    def __init__(self, script: Script, *, context_length: int = 4096) -> None:
        super().__init__(script, slots=8, context_length=context_length)
        self.asked: list[GenerationRequest] = []

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
        self.asked.append(request)
        return super().generate(request)


def noting(*, start: bool = False, infill: bool = False, context: int = 4096, **script: Any) -> NotingEngine:
    engine = NotingEngine(Script(**script), context_length=context)
    engine.vocabulary = replace(
        engine.vocabulary,
        start_token_id=START if start else None,
        infill=INFILL if infill else None,
    )
    return engine


def raw(text: str = "", *, token_ids: tuple[int, ...] = (), **fields: Any) -> ChatRequest:
    of_prompt = {name: fields.pop(name) for name in ("suffix", "echo") if name in fields}
    prompt = RawPrompt(text=text, token_ids=token_ids, **of_prompt)
    return ChatRequest(request_id="r", model="any", prompt=prompt, **{"max_tokens": 100, **fields})


async def reply_of(engine: Engine, chat: ChatRequest) -> Reply:
    async with aclosing(ChatRunner(engine, SPEC).run(chat)) as events:
        return await collect_reply(events)


async def events_of(engine: Engine, chat: ChatRequest) -> list[ChatEvent]:
    async with aclosing(ChatRunner(engine, SPEC).run(chat)) as events:
        return [event async for event in events]


async def prompt_of(engine: NotingEngine, chat: ChatRequest) -> list[int]:
    await reply_of(engine, chat)
    return list(engine.asked[-1].prompt_token_ids)


# What the model gets


async def test_a_text_stands_for_itself() -> None:
    assert await prompt_of(noting(), raw("Hé")) == list("Hé".encode())


async def test_control_tokens_that_are_written_in_it_are_recognised() -> None:
    assert await prompt_of(noting(), raw("a<|im_end|>b")) == [97, END, 98]


async def test_it_begins_with_the_token_that_the_model_wants_and_once_only() -> None:
    assert await prompt_of(noting(start=True), raw("a")) == [START, 97]
    assert await prompt_of(noting(start=True), raw("<|im_start|>a")) == [START, 97]
    assert await prompt_of(noting(start=True), raw("")) == [START]


async def test_token_ids_are_all_of_the_prompt() -> None:
    assert await prompt_of(noting(start=True), raw(token_ids=(END, 97))) == [END, 97]


async def test_a_suffix_stands_between_the_models_own_tokens() -> None:
    engine = noting(infill=True, start=True)
    assert await prompt_of(engine, raw("ab", suffix="c<|im_end|>")) == [START, 1, 97, 98, 2, 99, END, 3]
    assert await prompt_of(engine, raw(token_ids=(97,), suffix="")) == [1, 97, 2, 3]


@pytest.mark.parametrize(
    ("chat", "error", "param"),
    [
        (raw(""), InvalidRequest, "prompt"),
        (raw(token_ids=(5, 259)), InvalidRequest, "prompt"),
        (raw("a" * 200), ContextLengthExceeded, "prompt"),
        (raw("a" * 20, max_tokens=110), ContextLengthExceeded, "max_tokens"),
        (raw("a", suffix="b"), UnsupportedValue, "suffix"),
        (raw("a", repetition_guard=True), InvalidRequest, "repetition_guard"),
        (
            raw("a", repetition_guard=True, constraints=(Constraint(kind="choice", source=["a"]),)),
            InvalidRequest,
            "repetition_guard",
        ),
    ],
    ids=lambda value: "" if isinstance(value, ChatRequest) else str(value),
)
async def test_what_cannot_be_is_refused(chat: ChatRequest, error: type[GallamaError], param: str) -> None:
    engine = noting(context=128)
    with pytest.raises(error) as refused:
        await reply_of(engine, chat)
    assert refused.value.param == param
    assert engine.asked == []


async def test_without_a_limit_the_answer_has_the_rest_of_the_context() -> None:
    engine = noting(context=128)
    await reply_of(engine, raw("a" * 20, max_tokens=None))
    assert engine.asked[0].max_tokens == 108


async def test_a_prompt_may_fill_the_context_where_nothing_is_made() -> None:
    reply = await reply_of(noting(context=128), raw("a" * 128, max_tokens=0, echo=True))
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason) == ("a" * 128, "length")
    assert reply.usage.completion_tokens == 0


# What comes back


async def test_an_answer_is_split_into_neither_thoughts_nor_calls() -> None:
    for written in (CALL, "<think>\nhm\n</think>\n\nyes", "[tool: none]\nyes", "  <think>"):
        (choice,) = (await reply_of(noting(reply=written), raw("?"))).choices
        assert choice.text == written
        assert (choice.reasoning, choice.tool_calls, choice.finish_reason) == ("", [], "stop")


async def test_an_answer_is_bound_from_its_first_token_on() -> None:
    constraint = Constraint(kind="regex", source="<think>a+b", param="regex_pattern")
    (choice,) = (await reply_of(noting(reply="<think>aab"), raw("?", constraints=(constraint,)))).choices
    assert choice.text == "<think>aab"
    assert choice.guarantee is not None
    assert choice.guarantee.complete


async def test_a_dry_run_tells_the_prompt_as_it_is() -> None:
    events = await events_of(noting(), raw(token_ids=(97, END), dry_run=True))
    (explanation,) = [event.explanation for event in events if isinstance(event, Explained)]
    assert explanation.prompt == "a<|im_end|>"
    assert (explanation.prompt_tokens, explanation.dialect) == (2, "none")


# Echo


async def test_the_echo_is_the_first_text_of_each_choice() -> None:
    events = await events_of(noting(reply="xyz"), raw("ab<|im_end|>", echo=True, choices=2))
    first = {event.choice: event.text for event in reversed(events) if isinstance(event, AnswerText)}
    assert first == {0: "ab<|im_end|>", 1: "ab<|im_end|>"}


async def test_the_echo_comes_when_the_answer_does() -> None:
    engine = noting(reply="x", seconds_before_first_token=60)
    async with aclosing(ChatRunner(engine, SPEC).run(raw("ab", echo=True))) as events:
        await anext(events)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.1)


async def test_the_models_own_first_token_is_no_part_of_the_echo() -> None:
    chat = raw("ab", echo=True, logprobs=1, max_tokens=1)
    (choice,) = (await reply_of(noting(start=True, reply="c"), chat)).choices
    assert choice.text == "abc"
    assert [entry.token for entry in choice.logprobs] == ["a", "b", "c"]
    assert all(entry.logprob is not None for entry in choice.logprobs), "something stands in front of them"


async def test_control_tokens_of_an_echo_have_log_probabilities_by_name() -> None:
    chat = raw(token_ids=(97, END, 98), echo=True, logprobs=1, max_tokens=0)
    (choice,) = (await reply_of(noting(), chat)).choices
    assert [entry.token for entry in choice.logprobs] == ["a", "<|im_end|>", "b"]
    assert "".join(entry.token for entry in choice.logprobs) == choice.text


async def test_a_blank_that_the_tokenizer_adds_is_no_part_of_the_echo() -> None:
    engine = noting()
    plain = engine.tokenize
    engine.tokenize = lambda text: plain(" " + text)  # type: ignore[method-assign]
    (choice,) = (await reply_of(engine, raw("ab", echo=True, logprobs=1, max_tokens=0))).choices
    assert choice.text == "ab"
    assert b"".join(entry.token_bytes for entry in choice.logprobs) == b"ab"


async def test_a_prompt_is_scored_once_where_an_answer_is_made_again() -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 3}
    constraint = Constraint(kind="json_schema", source=schema)
    engine = noting(reply="[1,1]")
    chat = raw("ab", echo=True, logprobs=1, constraints=(constraint,), on_unsupported="weaken")
    (choice,) = (await reply_of(engine, chat)).choices
    assert choice.text.startswith("ab[")
    with pytest.raises(GallamaError):
        await reply_of(engine, raw("ab", echo=True, logprobs=1, constraints=(constraint,)))
    assert [asked.prompt_logprobs for asked in engine.asked] == [True, True, False, False, False]


async def test_an_engine_that_scores_no_prompts_is_found_out() -> None:
    class Silent(ScriptedEngine):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
            yield GeneratedChunk(text="x", logprobs=(TokenLogprob(120, -1.0),), sampled_tokens=1)
            yield GeneratedChunk(end="stop")

    with pytest.raises(UnsupportedValue) as refused:
        await reply_of(Silent(Script(), slots=1, context_length=999), raw("ab", echo=True, logprobs=1))
    assert refused.value.param == "logprobs"


async def test_a_scored_echo_with_a_suffix_is_refused() -> None:
    chat = raw("a", suffix="b", echo=True, logprobs=0)
    with pytest.raises(UnsupportedValue) as refused:
        await reply_of(noting(infill=True), chat)
    assert refused.value.param == "suffix"
    (choice,) = (await reply_of(noting(infill=True, reply="x"), raw("a", suffix="b", echo=True))).choices
    assert choice.text == "ax"


# A real model that fills in


@pytest.fixture(scope="module")
def infilling(infilling_path: Path) -> Iterator[Engine]:
    model = resolve_model({"model_id": str(infilling_path), "max_seq_len": 512}, ServerConfig())
    engine = ENGINES["llama_cpp"](model.spec, model.path)
    yield engine
    asyncio.run(engine.close())


async def test_the_infill_tokens_of_a_model_are_found(infilling: Engine, smollm2: Engine) -> None:
    assert smollm2.vocabulary.infill is None
    names = infilling.vocabulary.control_tokens
    assert infilling.vocabulary.infill == InfillTokens(
        prefix=names["<|fim_prefix|>"], suffix=names["<|fim_suffix|>"], middle=names["<|fim_middle|>"]
    )


async def test_a_model_with_infill_tokens_fills_in(infilling: Engine) -> None:
    chat = raw("def add(a, b):\n    ", suffix="\n\nprint(add(1, 2))", max_tokens=4)
    reply = await reply_of(infilling, chat)
    tokens = [len(infilling.tokenize(text)) for text in (chat.prompt.text, chat.prompt.suffix)]  # type: ignore[union-attr, arg-type]
    assert reply.usage.prompt_tokens == 3 + sum(tokens)
    assert 1 <= reply.usage.completion_tokens <= 4
