"""What the body of a chat request means."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from openai.types.chat import completion_create_params

from gallama.api.openai_chat_request import HONOURED_VALUES, ChatCompletionBody, to_chat_request
from gallama.api.openai_generation_body import ConstraintEngine
from gallama.api.request_bodies import parse_body
from gallama.constraints.engines import ENGINE_NAMES
from gallama.conversation import ChatRequest, Constraint, Message, ToolCall, ToolChoice, ToolSpec
from gallama.errors import InvalidRequest, UnsupportedValue

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"const": None}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}} for name in "fgh"
]
GRAMMAR = {"syntax": "lark", "definition": 'start: "a"'}


def meaning_of(**fields: Any) -> ChatRequest:
    raw = json.dumps({"model": "m", "messages": [USER], **fields}).encode()
    return to_chat_request(parse_body(raw, ChatCompletionBody), request_id="r", model="real-name")


def test_every_field_of_openais_is_known() -> None:
    theirs = set(completion_create_params.CompletionCreateParamsStreaming.__annotations__)
    theirs |= set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    assert theirs - set(ChatCompletionBody.model_fields) == set()


def test_the_smallest_request() -> None:
    assert meaning_of() == ChatRequest(
        request_id="r", model="real-name", messages=(Message(role="user", content="hi"),)
    )


def test_sampling_is_passed_on() -> None:
    sampling = meaning_of(
        temperature=0,
        top_p=1,
        top_k=-1,
        min_p=0.5,
        repetition_penalty=1.1,
        frequency_penalty=-2,
        presence_penalty=2,
        seed=-(2**63),
        logit_bias={"7": -100, "0": 0.5},
    ).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 1, 0, 0.5)
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.1, -2)
    assert (sampling.presence_penalty, sampling.seed) == (2, -(2**63))
    assert sampling.logit_bias == {7: -100, 0: 0.5}


def test_messages_of_every_role() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
    messages = meaning_of(
        messages=[
            {"role": "developer", "content": "a"},
            {"role": "system", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
            {"role": "user", "content": "d", "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
            {"role": "tool", "tool_call_id": "c1", "content": ""},
            {"role": "assistant", "content": "e", "reasoning_content": "f"},
        ]
    ).messages
    assert messages == (
        Message(role="system", content="a"),
        Message(role="system", content="b\nc"),
        Message(role="user", content="d", name="Ann"),
        Message(role="assistant", tool_calls=(ToolCall(id="c1", name="f", arguments="{}"),)),
        Message(role="tool", tool_call_id="c1"),
        Message(role="assistant", content="e", reasoning="f"),
    )


def test_tools_keep_their_schema_with_its_nulls() -> None:
    assert meaning_of(tools=TOOLS[:1]).tools == (ToolSpec(name="f", parameters=SCHEMA, strict=True),)


@pytest.mark.parametrize("function", [{"name": "f"}, {"name": "f", "parameters": None, "description": None}])
def test_a_tool_without_parameters_takes_any_object(function: dict[str, Any]) -> None:
    assert meaning_of(tools=[{"type": "function", "function": function}]).tools == (ToolSpec(name="f"),)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, ToolChoice(mode="auto")),
        ("auto", ToolChoice(mode="auto")),
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        (
            {"type": "function", "function": {"name": "g"}},
            ToolChoice(mode="required", allowed=("g",)),
        ),
        ({"type": "function", "name": "g"}, ToolChoice(mode="required", allowed=("g",))),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": name}} for name in "hgh"],
                },
            },
            ToolChoice(mode="auto", allowed=("h", "g")),
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            ToolChoice(mode="required", allowed=("f",)),
        ),
    ],
)
def test_tool_choices(given: Any, meant: ToolChoice) -> None:
    assert meaning_of(tools=TOOLS, tool_choice=given).tool_choice == meant


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_without_tools_a_choice_that_demands_none_is_fine(choice: str | None) -> None:
    assert meaning_of(tool_choice=choice).tools == ()


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint(kind="json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            Constraint(
                kind="json_schema",
                source=SCHEMA,
                strict=True,
                param="response_format.json_schema.schema",
            ),
        ),
        ({"regex_pattern": "a+"}, Constraint(kind="regex", source="a+", param="regex_pattern")),
        (
            {"regex_prefix_pattern": "a+"},
            Constraint(kind="regex_prefix", source="a+", param="regex_prefix_pattern"),
        ),
        ({"prefix_strings": "a"}, Constraint(kind="prefix", source=["a"], param="prefix_strings")),
        (
            {"prefix_strings": ["a", "b"]},
            Constraint(kind="prefix", source=["a", "b"], param="prefix_strings"),
        ),
        ({"choice": ["a"]}, Constraint(kind="choice", source=["a"], param="choice")),
        ({"grammar": GRAMMAR}, Constraint(kind="grammar", source=GRAMMAR, param="grammar")),
    ],
)
def test_constraints(fields: dict[str, Any], meant: Constraint | None) -> None:
    assert meaning_of(**fields).constraints == (() if meant is None else (meant,))


def test_several_constraints_are_all_passed_on() -> None:
    request = meaning_of(regex_pattern="a+", prefix_strings="a", choice=["aa"])
    assert [constraint.kind for constraint in request.constraints] == ["regex", "prefix", "choice"]


def test_a_constraint_beside_tools_that_may_not_be_called_holds() -> None:
    request = meaning_of(tools=TOOLS, tool_choice="none", choice=["a"])
    assert len(request.constraints) == 1


def test_a_constraint_beside_tools_that_may_be_called_is_for_answers_in_text() -> None:
    request = meaning_of(tools=TOOLS, response_format={"type": "json_object"})
    assert [constraint.kind for constraint in request.constraints] == ["json_object"]


@pytest.mark.parametrize(
    "fields", [{"choice": ["a"]}, {"regex_pattern": "a"}, {"prefix_strings": "a"}, {"grammar": GRAMMAR}]
)
def test_text_of_a_certain_form_beside_a_demanded_call_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="an answer cannot be both") as refused:
        meaning_of(tools=TOOLS, tool_choice="required", **fields)
    assert refused.value.param in fields


def test_a_response_format_beside_a_demanded_call_is_for_later_answers_as_with_openai() -> None:
    request = meaning_of(tools=TOOLS, tool_choice="required", response_format={"type": "json_object"})
    assert request.constraints == ()


def test_what_guards_the_constraints_is_passed_on() -> None:
    request = meaning_of(
        thinking_template="<a>b</a>",
        on_unsupported="weaken",
        guided_decoding_backend="outlines",
        explain=True,
        repetition_guard=True,
    )
    assert (request.thinking_template, request.on_unsupported) == ("<a>b</a>", "weaken")
    assert (request.constraint_engine, request.explain, request.repetition_guard) == ("outlines", True, True)


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"stop": "a"}, ("a",)),
        ({"stop": ["a", "b"], "stop_words": "c"}, ("a", "b", "c")),
        ({"stop": "a", "stop_words": ["a", "b"]}, ("a", "b")),
        ({"stop": []}, ()),
        ({"stop": None}, ()),
    ],
)
def test_stop_words_under_both_names_are_one_list(fields: dict[str, Any], meant: tuple[str, ...]) -> None:
    assert meaning_of(**fields).stop == meant


def test_too_many_stop_words_over_both_names_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="20 stop words"):
        meaning_of(stop=[str(i) for i in range(10)], stop_words=[str(i) for i in range(10, 20)])


def test_the_two_names_of_the_limit_may_agree() -> None:
    assert meaning_of(max_tokens=5).max_tokens == 5
    assert meaning_of(max_completion_tokens=5).max_tokens == 5
    assert meaning_of(max_tokens=5, max_completion_tokens=5).max_tokens == 5


def test_logprobs() -> None:
    assert meaning_of().logprobs is None
    assert meaning_of(logprobs=False).logprobs is None
    assert meaning_of(logprobs=True).logprobs == 0
    assert meaning_of(logprobs=True, top_logprobs=3).logprobs == 3


def test_our_other_fields_are_passed_on() -> None:
    request = meaning_of(
        leading_prompt="Well, ", return_stop_word=True, n=3, parallel_tool_calls=False, reasoning_effort="low"
    )
    assert (request.leading_prompt, request.return_stop_word, request.choices) == ("Well, ", True, 3)
    assert (request.parallel_tool_calls, request.reasoning_effort) == (False, "low")


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
        *({name: value} for name, values in HONOURED_VALUES.items() for value in values),
    ],
)
def test_fields_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert meaning_of(**fields) == meaning_of()


@pytest.mark.parametrize("name", HONOURED_VALUES)
def test_fields_that_are_not_honoured_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedValue) as refused:
        meaning_of(**{name: "something else"})
    assert refused.value.param == name
    assert name in refused.value.message


def test_the_old_names_of_tools_lead_to_the_new_ones() -> None:
    with pytest.raises(UnsupportedValue, match="Use `tools`"):
        meaning_of(functions=[])


def test_the_constraint_engines_that_can_be_named_are_those_that_workers_know() -> None:
    assert get_args(ConstraintEngine) == ENGINE_NAMES
