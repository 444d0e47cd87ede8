"""Tools for any model: what a template does not know is written into the text of its messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gallama.constraints.envelope import ToolEnvelope
from gallama.dialects.dialect import Dialect
from gallama.dialects.hermes import HERMES, HERMES_ENVELOPE

TOOLS_IN_SYSTEM_MESSAGE = """\
You can call these tools:
{tools}

To call a tool, answer with its name and its arguments in this form:
{example}
If no tool helps, answer in plain words."""

TOOL_RESULT = "<tool_response>\n{content}\n</tool_response>"

UNIVERSAL = Dialect(
    name="universal",
    recognises=lambda chat_template: False,  # what remains when no other dialect recognises a template
    envelope=HERMES_ENVELOPE,
    tools_in_template=False,
    examples=HERMES.examples,
)

TemplateMessage = dict[str, Any]
"""A message as chat templates know it: role, content, and tool_calls, tool_call_id or name if it has them."""


def speak_tools(
    messages: Sequence[TemplateMessage], tools: Sequence[Mapping[str, Any]], envelope: ToolEnvelope
) -> list[TemplateMessage]:
    """The same conversation with tools, calls and results as text; roles system, user, assistant only.

    Args:
        tools: as chat templates know them, {"type": "function", "function": {...}}.
    """
    spoken = _with_tools(list(messages), tools, envelope)
    spoken = [_spoken_call(message, envelope) if "tool_calls" in message else message for message in spoken]
    return _spoken_results(spoken)


def _with_tools(
    messages: list[TemplateMessage], tools: Sequence[Mapping[str, Any]], envelope: ToolEnvelope
) -> list[TemplateMessage]:
    if not tools:
        return messages
    description = TOOLS_IN_SYSTEM_MESSAGE.format(
        tools="\n".join(_json(tool["function"], envelope) for tool in tools),
        example=_calls([("TOOL_NAME", '{"ARGUMENT": "VALUE"}')], envelope),
    )
    if messages and messages[0]["role"] == "system":
        content = f"{messages[0]['content']}\n\n{description}".lstrip()
        return [{**messages[0], "content": content}, *messages[1:]]
    return [{"role": "system", "content": description}, *messages]


def _spoken_call(message: TemplateMessage, envelope: ToolEnvelope) -> TemplateMessage:
    functions = [call["function"] for call in message["tool_calls"]]
    calls = _calls(
        [(function["name"], _json(function["arguments"], envelope)) for function in functions], envelope
    )
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, (message["content"], calls)))}


def _calls(calls: Sequence[tuple[str, str]], envelope: ToolEnvelope) -> str:
    """The calls, given as (name, JSON text of arguments), as a model would write them."""
    written = (
        envelope.call_begin + name + envelope.name_end + arguments + envelope.call_end
        for name, arguments in calls
    )
    return envelope.begin + envelope.between.join(written) + envelope.end


def _spoken_results(messages: Sequence[TemplateMessage]) -> list[TemplateMessage]:
    """Results become the user's words; those of one round one message, as many templates demand turns."""
    spoken: list[TemplateMessage] = []
    previous_role = None
    for message in messages:
        if message["role"] != "tool":
            spoken.append(message)
        else:
            result = TOOL_RESULT.format(content=message["content"])
            if previous_role == "tool":
                spoken[-1]["content"] += "\n" + result
            else:
                spoken.append({"role": "user", "content": result})
        previous_role = message["role"]
    return spoken


def _json(value: Any, envelope: ToolEnvelope) -> str:
    separators = (envelope.item_separator, envelope.key_separator)
    return json.dumps(value, ensure_ascii=False, separators=separators)
