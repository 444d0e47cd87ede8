"""Thinking templates over HTTP: the block has the shape of the template, and an answer follows it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import jsonschema
import pytest
from openai import BadRequestError, OpenAI

from gallama.config import ModelSpec
from gallama.constraints.thinking import parse_template, template_regex
from gallama.conversation import ChatRequest, Message, Reply, collect_reply
from gallama.generation import Engine, EngineStatus, GeneratedChunk, GenerationRequest
from gallama.worker.chat import ChatRunner

MODEL = "smollm2-135m"
SEED_SNIPPET = Path(__file__).parents[1] / "data" / "seed_readme" / "thinking.py.txt"
(SEED_TEMPLATE,) = re.findall(r'thinking_template = """(.*?)"""', SEED_SNIPPET.read_text(), re.DOTALL)

PLAN = """<plan>
  <goal>{goal:text(8)}</goal>
  <step>{step:text(8)}</step>
  <step>{step:text(8)}</step>
  <!-- up to 3 -->
  <pace>{slow|quick}</pace>
</plan>"""
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [30, 40, 50]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WASH = {
    "type": "function",
    "function": {
        "name": "wash",
        "parameters": {
            "type": "object",
            "properties": {"warm": {"type": "boolean"}},
            "required": ["warm"],
            "additionalProperties": False,
        },
    },
}


def ask(client: OpenAI, question: str = "How do I get to Rome?", **fields: Any) -> Any:
    """A completion; what OpenAI's API does not know goes into `extra_body`."""
    own = {"thinking_template", "return_thinking", "regex_pattern", "explain"}
    extra_body = {"thinking_template": PLAN} | {name: fields[name] for name in own & fields.keys()}
    known = {name: value for name, value in fields.items() if name not in own}
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        extra_body=extra_body,
        **({"max_tokens": 120, "temperature": 1.0} | known),
    )


def assert_has_shape(thinking: str, template: str = PLAN) -> None:
    assert re.fullmatch(template_regex(parse_template(template)), thinking)
    for leaf in ElementTree.fromstring(thinking).iter():
        assert leaf.text is not None
        assert len(leaf) or leaf.text.strip()


def put_together(stream: Any) -> dict[str, Any]:
    """The message that a stream adds up to, as plain data."""
    message: dict[str, Any] = {}
    for chunk in stream:
        for name, value in chunk.choices[0].delta.to_dict().items():
            if name == "thinking_fields":
                add_fields(message.setdefault(name, []), value)
            elif isinstance(value, str) and name != "role":
                message[name] = message.get(name, "") + value
            else:
                message[name] = value
    return message


def add_fields(fields: list[dict[str, str]], parts: list[dict[str, Any]]) -> None:
    for part in parts:
        if part["index"] == len(fields):
            fields.append({"path": part["path"], "text": ""})
        field = fields[part["index"]]
        assert field["path"] == part["path"]
        field["text"] += part["text"]


# The example of the first README


def test_the_seeds_template_gives_thinking_of_its_shape_and_an_answer_from_one_prompt(
    client: OpenAI, gateway_url: str
) -> None:
    variables: dict[str, Any] = {"client": client}
    exec(SEED_SNIPPET.read_text().replace('"mistral"', f'"{MODEL}"'), variables)
    completion = variables["completion"]
    (choice,) = completion.choices
    assert_has_shape(choice.message.thinking, SEED_TEMPLATE.strip())
    steps = ElementTree.fromstring(choice.message.thinking).findall("steps/step")
    assert len(steps) >= 2
    assert choice.message.content.strip()
    assert choice.message.thinking not in choice.message.content

    body = {"messages": variables["messages"], "model": MODEL, "max_tokens": 200}
    body["thinking_template"] = SEED_TEMPLATE
    explanation = httpx.post(f"{gateway_url}/v1/explain", json=body, trust_env=False).json()
    assert completion.usage.prompt_tokens == explanation["prompt_tokens"]
    assert completion.usage.completion_tokens <= 200
    assert choice.guarantee["attempts"] == 1


def test_thinking_and_answer_come_from_one_generation(client: OpenAI) -> None:
    first = ask(client, "Where does the Tiber flow?", explain=True)
    again = ask(client, "Where does the Tiber flow?", explain=True)
    details = again.usage.prompt_tokens_details
    # Not even the prompt's last token is read again: what the template forces behind it was read, too.
    assert details.cached_tokens == again.usage.prompt_tokens
    spans = first.choices[0].explanation["spans"]
    tokens = sum(span["tokens"] for span in spans)
    assert tokens == first.usage.completion_tokens
    of_template = sum(span["tokens"] for span in spans if span["constraint"] == "template")
    assert of_template == first.usage.completion_tokens_details.reasoning_tokens
    assert 0 < of_template < tokens


# Where the thinking goes


@pytest.mark.parametrize("return_thinking", [False, True, "separate", "fields"])
def test_thinking_goes_where_it_is_wanted_streamed_as_whole(client: OpenAI, return_thinking: Any) -> None:
    fields = {"return_thinking": return_thinking, "seed": 5}
    message = ask(client, **fields).choices[0].message.to_dict()
    beside = {"thinking", "reasoning_content", "thinking_fields"} & message.keys()
    if return_thinking in (False, True):
        assert not beside
        assert ("</plan>\n\n" in message["content"]) is return_thinking
    else:
        assert message["thinking"] == message["reasoning_content"]
        assert_has_shape(message["thinking"])
        assert message["thinking"] not in message["content"]
        assert ("thinking_fields" in message) is (return_thinking == "fields")
    if return_thinking is True:
        assert_has_shape(message["content"].split("\n\n")[0])
    assert put_together(ask(client, stream=True, **fields)) == message


def test_fields_are_the_leaves_of_the_block(client: OpenAI) -> None:
    message = ask(client, return_thinking="fields").choices[0].message
    leaves = list(ElementTree.fromstring(message.thinking))
    shown = [(field["path"], field["text"]) for field in message.thinking_fields]
    assert shown == [(f"plan.{leaf.tag}", leaf.text) for leaf in leaves]


def test_all_ways_to_return_thinking_show_the_same_answer(client: OpenAI) -> None:
    without, inside, beside = (
        ask(client, return_thinking=way, seed=7).choices[0].message for way in (False, True, "separate")
    )
    assert without.content == beside.content
    assert inside.content == f"{beside.thinking}\n\n{beside.content}"


# Beside other fields


def test_each_choice_thinks_for_itself(client: OpenAI) -> None:
    completion = ask(client, n=2, temperature=1.2)
    thoughts = [choice.message.thinking for choice in completion.choices]
    for thinking in thoughts:
        assert_has_shape(thinking)
    assert thoughts[0] != thoughts[1]
    usage = completion.usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_log_probabilities_are_those_of_the_answer_alone(client: OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=1).choices[0]
    tokens = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    # Of the last token a limit may have cut a character.
    assert tokens.decode(errors="replace").removesuffix("\ufffd") == choice.message.content
    assert_has_shape(choice.message.thinking)


def test_stop_words_act_on_the_answer_alone(client: OpenAI) -> None:
    words = ["goal", "slow", "quick", " the"]
    for _ in range(3):
        choice = ask(client, stop=words).choices[0]
        assert_has_shape(choice.message.thinking)
        assert not any(word in choice.message.content for word in words)


def test_a_schema_holds_behind_thinking(client: OpenAI) -> None:
    schema = {"name": "person", "schema": PERSON}
    choice = ask(client, response_format={"type": "json_schema", "json_schema": schema}).choices[0]
    assert_has_shape(choice.message.thinking)
    jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert (choice.guarantee["kind"], choice.guarantee["beside"]) == ("json_schema", ["template"])


def test_tools_are_called_behind_thinking(client: OpenAI) -> None:
    for stream in (False, True):
        fields = {"tools": [WASH], "tool_choice": "required", "parallel_tool_calls": False}
        answer = ask(client, "Wash my car, please.", stream=stream, **fields)
        message = put_together_call(answer) if stream else answer.choices[0].message.to_dict()
        assert_has_shape(message["thinking"])
        (call,) = message["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, WASH["function"]["parameters"])  # type: ignore[index]
        assert not message["content"]


def put_together_call(stream: Any) -> Mapping[str, Any]:
    """The message of a stream with one call."""
    arguments = ""

    def without_calls() -> Any:
        nonlocal arguments
        for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or ():
                arguments += call.function.arguments or ""
            yield chunk

    message = put_together(without_calls())
    return {**message, "tool_calls": [{"function": {"arguments": arguments}}]}


def test_a_pattern_holds_behind_thinking(client: OpenAI) -> None:
    choice = ask(client, regex_pattern="(Yes|No), [a-z]{3,9}[.]").choices[0]
    assert_has_shape(choice.message.thinking)
    assert re.fullmatch("(Yes|No), [a-z]{3,9}[.]", choice.message.content)
    assert choice.guarantee["complete"]


# Room


@pytest.mark.parametrize("max_tokens", [60, 80, 120])
def test_thinking_leaves_room_for_an_answer(client: OpenAI, max_tokens: int) -> None:
    choice = ask(client, max_tokens=max_tokens, regex_pattern="[a-z]{3}").choices[0]
    assert_has_shape(choice.message.thinking)
    assert re.fullmatch("[a-z]{3}", choice.message.content)


def test_a_limit_that_no_block_fits_in_is_refused_with_the_tokens_it_takes(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refusal:
        ask(client, max_tokens=10)
    assert refusal.value.param == "max_tokens"
    assert re.search(r"takes at least \d+ tokens", refusal.value.message)


# Models that reason by themselves


class ReasoningModel:
    """An engine whose chat template is one of a model that reasons."""

    def __init__(self, engine: Engine, chat_template: str) -> None:
        self._engine = engine
        self.chat_template = chat_template
        self.context_length = engine.context_length
        self.vocabulary = engine.vocabulary

    def tokenize(self, text: str) -> list[int]:
        return self._engine.tokenize(text)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
        return self._engine.generate(request)

    def status(self) -> EngineStatus:
        return self._engine.status()

    async def probe(self) -> None:
        await self._engine.probe()

    async def close(self) -> None:
        pass


MESSAGES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
OPENS_REASONING = MESSAGES + "<think>\n{% endif %}"
LEAVES_REASONING_TO_THE_MODEL = MESSAGES + "{% endif %}{# </think> is left out of earlier turns #}"
SKIPS_REASONING = MESSAGES + "<think>\n\n</think>\n\n{% endif %}"


async def reply_of(engine: Engine, **fields: Any) -> Reply:
    request = ChatRequest(
        request_id="r",
        model="any",
        messages=(Message(role="user", content="How do I get to Rome?"),),
        thinking_template=PLAN,
        max_tokens=120,
        **fields,
    )
    runner = ChatRunner(engine, ModelSpec(model_id="any", prompt_template="hermes"))
    async with aclosing(runner.run(request)) as events:
        return await collect_reply(events)


@pytest.mark.parametrize(
    ("chat_template", "seam"),
    [
        (OPENS_REASONING, "</plan>\n</think>\n\n"),
        (LEAVES_REASONING_TO_THE_MODEL, "</plan>\n\n"),
        (SKIPS_REASONING, "</plan>\n\n"),
    ],
    ids=["open", "possible", "skipped"],
)
async def test_a_template_stands_in_a_models_own_reasoning_or_instead_of_it(
    smollm2: Engine, chat_template: str, seam: str
) -> None:
    reply = await reply_of(ReasoningModel(smollm2, chat_template), explain=True)
    (choice,) = reply.choices
    assert_has_shape(choice.reasoning)
    assert choice.text
    assert "think>" not in choice.text
    assert choice.spans is not None
    written = "".join(span.text for span in choice.spans)
    assert written == choice.reasoning.removesuffix("</plan>") + seam + choice.text
    assert 0 < reply.usage.reasoning_tokens < reply.usage.completion_tokens
