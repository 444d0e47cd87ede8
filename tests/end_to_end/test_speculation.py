"""Forced runs and guesses over HTTP: the same answers as without them, and a usage that tells."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

MODEL = "smollm2-135m"
SONG = "A cat sat on a mat, a dog sat on a log, and a frog sat on a rock."
PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"enum": ["Ada", "Bob"]},
        "favourite_season": {"enum": ["summer", "winter"]},
        "is_member": {"type": "boolean"},
    },
    "required": ["first_name", "favourite_season", "is_member"],
    "additionalProperties": False,
}
LINE = '{"first_name":"Ada","favourite_season":"winter","is_member":true}'
TOOL = {"type": "function", "function": {"name": "save_person", "parameters": PERSON}}
THINKING = "<plan>\n  <animal>{cat|dog|frog}</animal>\n  <place>{mat|log|rock}</place>\n</plan>"

# Prompts that a model which copies leaves no doubt about: what is computed in another batch differs in the
# last bits.
WORKS: dict[str, dict[str, Any]] = {
    "free": {"max_tokens": 16},
    "schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    },
    "tool": {"tools": [TOOL], "tool_choice": "required"},
    "thinking": {"extra_body": {"thinking_template": THINKING, "regex_pattern": "A (cat|dog) sat on a mat"}},
}


def body(work: str) -> dict[str, Any]:
    shown = LINE if work in ("schema", "tool") else SONG
    messages = [{"role": "user", "content": "Say it again."}, {"role": "assistant", "content": shown}] * 3
    messages.append({"role": "user", "content": "Say it again."})
    return {"model": MODEL, "messages": messages, "max_tokens": 120, "temperature": 0, **WORKS[work]}


def said(message: Any) -> tuple[Any, ...]:
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content or "", getattr(message, "reasoning_content", None) or "", calls


def whole(client: OpenAI, work: str, **fields: Any) -> Any:
    return client.chat.completions.create(**body(work), **fields)


def streamed(client: OpenAI, work: str) -> tuple[tuple[Any, ...], Any]:
    """What a stream adds up to, and its usage."""
    content, reasoning, calls, usage = "", "", [], None
    for chunk in client.chat.completions.create(
        **body(work), stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                if call.function.name:
                    calls.append((call.function.name, ""))
                name, arguments = calls[-1]
                calls[-1] = name, arguments + (call.function.arguments or "")
    return (content, reasoning, calls), usage


async def together(client: OpenAI) -> list[tuple[Any, ...]]:
    async with AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0) as other:
        replies = await asyncio.gather(*(other.chat.completions.create(**body(work)) for work in WORKS))
    return [said(reply.choices[0].message) for reply in replies]


@pytest.fixture(scope="module")
def clients(
    client: OpenAI,
    smollm2_path: Path,
    serving_gateway: Callable[..., AbstractContextManager[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], OpenAI]]:
    """Clients of gateways with these settings, started when they are first asked for."""
    settings = {
        "slow": "backend_extra_args.jump_forward=false",
        "ngram": "speculative=ngram",
        "draft": f"draft_model_id={smollm2_path}",
    }
    opened: dict[str, OpenAI] = {"default": client}
    with ExitStack() as stack:

        def client_of(name: str) -> OpenAI:
            if name not in opened:
                gateway = stack.enter_context(
                    serving_gateway(
                        tmp_path_factory.mktemp(name), settings=f"max_seq_len=1024 {settings[name]}"
                    )
                )
                opened[name] = stack.enter_context(
                    OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
                )
            return opened[name]

        yield client_of


@pytest.fixture(scope="module")
def expected(clients: Callable[[str], OpenAI]) -> dict[str, tuple[Any, ...]]:
    """What is said where each token is sampled by itself."""
    return {work: said(whole(clients("slow"), work).choices[0].message) for work in WORKS}


def test_each_work_is_what_it_is_meant_to_be(expected: dict[str, tuple[Any, ...]]) -> None:
    assert expected["free"][0].startswith("A cat sat on a mat")
    assert json.loads(expected["schema"][0]).keys() == PERSON["properties"].keys()  # type: ignore[attr-defined]
    assert [name for name, _ in expected["tool"][2]] == ["save_person"]
    assert expected["thinking"][1].startswith("<plan>")


@pytest.mark.parametrize("name", ["default", "ngram", "draft"])
def test_greedy_answers_are_the_same_whole_and_streamed(
    clients: Callable[[str], OpenAI], expected: dict[str, tuple[Any, ...]], name: str
) -> None:
    client = clients(name)
    assert {work: said(whole(client, work).choices[0].message) for work in WORKS} == expected
    assert {work: streamed(client, work)[0] for work in WORKS} == expected


@pytest.mark.parametrize("name", ["default", "ngram", "draft"])
async def test_greedy_answers_are_the_same_at_once(
    clients: Callable[[str], OpenAI], expected: dict[str, tuple[Any, ...]], name: str
) -> None:
    assert await together(clients(name)) == list(expected.values())


@pytest.mark.parametrize("name", ["default", "ngram"])
@pytest.mark.parametrize("work", ["free", "schema"])
def test_greedy_choices_of_one_prompt_are_equal(
    clients: Callable[[str], OpenAI], expected: dict[str, tuple[Any, ...]], name: str, work: str
) -> None:
    completion = whole(clients(name), work, n=3)
    assert [said(choice.message) for choice in completion.choices] == [expected[work]] * 3


@pytest.mark.parametrize("work", ["schema", "tool", "thinking"])
def test_the_guarantee_counts_what_was_forced(clients: Callable[[str], OpenAI], work: str) -> None:
    jumping, slow = (whole(clients(name), work) for name in ("default", "slow"))
    with_jumps, without = (completion.choices[0].guarantee for completion in (jumping, slow))
    assert without["forced_tokens"] == 0
    assert with_jumps["forced_tokens"] > with_jumps["sampled_tokens"]
    assert with_jumps["forced_tokens"] + with_jumps["sampled_tokens"] == without["sampled_tokens"]


def test_the_usage_tells_what_was_guessed(clients: Callable[[str], OpenAI]) -> None:
    client = clients("ngram")
    usages = [
        whole(client, "free").usage,
        whole(client, "free", n=2).usage,
        streamed(client, "free")[1],
    ]
    for usage in usages:
        details = usage.completion_tokens_details
        # Whether a guess pays depends on the machine.
        assert 0 <= details.accepted_prediction_tokens < usage.completion_tokens
        assert details.rejected_prediction_tokens >= 0


def test_the_usage_says_nothing_of_guesses_where_none_are_made(clients: Callable[[str], OpenAI]) -> None:
    details = whole(clients("default"), "free").usage.completion_tokens_details
    assert details.to_dict() == {"reasoning_tokens": 0}
