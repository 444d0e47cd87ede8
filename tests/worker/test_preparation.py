from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gallama.config import ModelSpec
from gallama.conversation import ChatRequest, Constraint, Message, RawPrompt, ToolChoice, ToolSpec
from gallama.engines.scripted import Script, ScriptedEngine
from gallama.errors import ContextLengthExceeded, InvalidRequest
from gallama.generation import Vocabulary
from gallama.worker.preparation import ChatPreparer, PreparedChat

TEMPLATE = "<a><b>{x}</b><c>{y}</c></a>"
TOOL = ToolSpec(name="now")


def engine() -> ScriptedEngine:
    return ScriptedEngine(Script(), slots=1, context_length=4096)


def request(content: str = "?", **fields: Any) -> ChatRequest:
    messages = (Message(role="user", content=content),)
    return ChatRequest(request_id="r", model="any", messages=messages, **fields)


async def prepared(
    chat: ChatRequest, *, on: ScriptedEngine | None = None, dialect: str = "hermes"
) -> PreparedChat:
    spec = ModelSpec(model_id="any", prompt_template=dialect)
    return await ChatPreparer(on or engine(), spec).prepare(chat)


def with_marks(vocabulary: Vocabulary, *marks: str) -> Vocabulary:
    return replace(vocabulary, marks=frozenset(marks))


async def test_a_client_cannot_write_a_mark_of_the_models_template() -> None:
    model = engine()
    model.vocabulary = with_marks(model.vocabulary, "<tool_call>", "<table>")
    model.chat_template = "{# <tool_call> #}" + model.chat_template
    segments = (await prepared(request("a <tool_call> b <table> c"), on=model)).prompt.segments
    assert not any("<tool_call>" in segment for segment in segments)
    assert any("<table>" in segment for segment in segments), "no mark of this model's prompts"


async def test_thinking_leaves_room_for_an_answer() -> None:
    chat = await prepared(request(thinking_template=TEMPLATE, max_tokens=200))
    assert chat.thinking_tokens == 150
    assert chat.spec is not None
    assert chat.spec.kind == "template"


async def test_a_template_that_does_not_fit_is_refused_before_anything_is_generated() -> None:
    with pytest.raises(InvalidRequest, match="takes at least") as refused:
        await prepared(request(thinking_template=TEMPLATE, max_tokens=20))
    assert refused.value.param == "max_tokens"


async def test_a_template_stands_instead_of_reasoning_and_in_it_where_it_is_open() -> None:
    model = engine()
    model.chat_template += "{# <think> </think> #}"
    constraint = (Constraint(kind="choice", source=["a"], param="choice"),)
    free = await prepared(request(constraints=constraint), on=model)
    assert free.spec is not None
    assert free.spec.reasoning is not None
    instead = await prepared(request(constraints=constraint, thinking_template=TEMPLATE), on=model)
    assert instead.spec is not None
    assert instead.spec.reasoning is None
    model.chat_template += "<think>\n"
    inside = await prepared(request(constraints=constraint, thinking_template=TEMPLATE), on=model)
    assert inside.spec is not None
    assert inside.spec.reasoning is not None
    assert inside.spec.reasoning.is_open


async def test_without_strings_to_guard_a_repetition_guard_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        await prepared(request(repetition_guard=True))
    assert refused.value.param == "repetition_guard"


async def test_what_text_must_be_holds_beside_tools_that_may_be_called() -> None:
    constraint = (Constraint(kind="json_object", param="response_format"),)
    chat = await prepared(request(tools=(TOOL,), constraints=constraint))
    assert chat.spec is not None
    assert (chat.spec.kind, chat.spec.beside) == ("tools", ("json_object",))


async def test_without_tools_that_may_be_called_only_the_text_is_bound() -> None:
    constraint = (Constraint(kind="json_object", param="response_format"),)
    chat = await prepared(request(tools=(TOOL,), tool_choice=ToolChoice(mode="none"), constraints=constraint))
    assert chat.spec is not None
    assert (chat.spec.kind, chat.spec.beside) == ("json_object", ())


async def test_the_guarantee_names_all_that_held() -> None:
    patterns = (
        Constraint(kind="regex", source="a+", param="regex_pattern"),
        Constraint(kind="prefix", source=["a"], param="prefix_strings"),
    )
    alone = await prepared(request(constraints=patterns))
    assert alone.spec is not None
    assert (alone.spec.kind, alone.spec.beside) == ("regex", ("prefix",))
    beside = await prepared(request(constraints=patterns, tools=(TOOL,), thinking_template=TEMPLATE))
    assert beside.spec is not None
    assert (beside.spec.kind, beside.spec.beside) == ("tools", ("template", "regex", "prefix"))


class NeverTokenizes(ScriptedEngine):
    """Texts that cannot fit are not to be tokenized: it takes seconds for each megabyte."""

    def tokenize(self, text: str) -> list[int]:
        raise AssertionError("tokenized")


@pytest.mark.parametrize(
    ("chat", "param"),
    [
        (request("x" * 60_000), "messages"),
        (ChatRequest(request_id="r", model="any", prompt=RawPrompt(text="x" * 60_000)), "prompt"),
        (
            ChatRequest(request_id="r", model="any", prompt=RawPrompt(text="x", suffix="x" * 60_000)),
            "prompt",
        ),
    ],
)
async def test_what_cannot_fit_is_refused_before_it_is_tokenized(chat: ChatRequest, param: str) -> None:
    model = NeverTokenizes(Script(), slots=1, context_length=4096)
    with pytest.raises(ContextLengthExceeded, match="at most 53248 can fit") as refused:
        await prepared(chat, on=model)
    assert refused.value.param == param
