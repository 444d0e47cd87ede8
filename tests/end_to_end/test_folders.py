"""Models in folders of Hugging Face's form, through a gateway: noise, and every guarantee.

exllamav2 and exllamav3 run on the grounds that need no GPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.engines.on_ground import interpreter_on_ground
from tests.engines.tiny_llama import save_tiny_llama

MODEL = "tiny"
MESSAGES: list[Any] = [{"role": "user", "content": "Where is the old bridge?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 10},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "forecast", "description": "Tells the weather.", "parameters": SCHEMA},
}


def _transformers(folder: Path) -> str:
    return f"model_id={save_tiny_llama(folder)}"


def _exllamav2(folder: Path) -> str:
    from tests.engines.exllamav2.ground import save_folder

    path = save_folder(folder)
    return f"model_id={path} backend=exllama python={interpreter_on_ground('exllamav2', folder.parent)}"


def _exllamav3(folder: Path) -> str:
    from tests.engines.exllamav3.ground import save_model

    path = save_model(folder)
    return f"model_id={path} backend=exllamav3 python={interpreter_on_ground('exllamav3', folder.parent)}"


ENGINES: dict[str, Callable[[Path], str]] = {
    "transformers": _transformers,
    "exllamav2": _exllamav2,
    "exllamav3": _exllamav3,
}
"""What saves a model for an engine, and says how it is served."""


@pytest.fixture(scope="module", params=list(ENGINES))
def gateway(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    serving_gateway: Callable[..., Any],
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("models") / MODEL
    folder.mkdir()
    model = f"{ENGINES[request.param](folder)} max_concurrent_requests=8"
    with serving_gateway(tmp_path_factory.mktemp("gateway"), "-id", model, settings=None) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: OpenAI, **body: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **{"max_tokens": 60, **body})


def status(gateway: Any) -> Any:
    return httpx.get(f"{gateway.url}/ready", trust_env=False).json()["models"][MODEL]


def test_a_folder_is_served(gateway: Any, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = ask(client, temperature=0)
    assert answer.usage.completion_tokens > 0
    assert answer.usage.prompt_tokens > 10
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_streamed_answer_is_the_whole_one(client: OpenAI) -> None:
    whole = ask(client, temperature=0).choices[0].message.content
    chunks = list(ask(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    assert chunks[-1].usage.completion_tokens > 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_word_ends_the_answer(client: OpenAI, stream: bool) -> None:
    whole = ask(client, temperature=0).choices[0].message.content
    word = whole[8:11]
    answer = ask(client, temperature=0, stop=[word], stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
    else:
        text = answer.choices[0].message.content
    assert text == whole[: whole.index(word)]


def test_noise_holds_every_guarantee(gateway: Any) -> None:
    async def one(client: AsyncOpenAI, number: int) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
        ways: list[dict[str, Any]] = [
            {"response_format": form},
            {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
            {"extra_body": {"regex_pattern": "[a-z]{3,8}, [0-9]{4}"}},
            {"extra_body": {"choice": ["left", "right", "straight on"]}},
        ]
        return await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=300, temperature=1.3, **ways[number % 4]
        )

    async def run() -> list[Any]:
        async with AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=100
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(16)))

    answers = [answer.choices[0] for answer in asyncio.run(run())]
    for answer in answers[0::4]:
        jsonschema.validate(json.loads(answer.message.content), SCHEMA)
    for answer in answers[1::4]:
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls"
        assert call.function.name == "forecast"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    for answer in answers[2::4]:
        assert re.fullmatch("[a-z]{3,8}, [0-9]{4}", answer.message.content)
    for answer in answers[3::4]:
        assert answer.message.content in ("left", "right", "straight on")


def test_a_thinking_template_is_obeyed(client: OpenAI) -> None:
    template = "<plan><goal>{goal:text(8)}</goal><pace>{slow|quick}</pace></plan>"
    answer = ask(
        client,
        max_tokens=200,
        temperature=1,
        extra_body={"thinking_template": template, "return_thinking": "separate", "choice": ["yes", "no"]},
    )
    assert answer.choices[0].message.content in ("yes", "no")
    pattern = r"<plan><goal>[^<]*</goal><pace>(slow|quick)</pace></plan>"
    assert re.fullmatch(pattern, answer.choices[0].message.reasoning_content.strip(), re.DOTALL)
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def test_who_hangs_up_frees_the_slot(gateway: Any, client: OpenAI) -> None:
    stream = ask(client, max_tokens=900, stream=True, logit_bias={"0": -100, "2": -100})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while status(gateway)["busy"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_is_killed_is_started_again(gateway: Any, client: OpenAI) -> None:
    (before,) = gateway.worker_process_ids()
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while gateway.worker_process_ids() in ([], [before]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    gateway.wait_until_ready()
    assert ask(client, max_tokens=5).usage.completion_tokens > 0
