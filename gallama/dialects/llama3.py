"""Llama 3.1, 3.2 and 3.3: a call is the whole answer, `{"name": "f", "parameters": {...}}`.

The model may write the control token <|python_tag|> first; as any control token that is no part of the
envelope it carries no text, so nothing here needs to know it.

Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
"""

from __future__ import annotations

from gallama.constraints.envelope import ToolEnvelope
from gallama.dialects.dialect import Dialect, Example

_MARKS = ("<|start_header_id|>", '{"name": "', '"parameters": ')


def _recognises(chat_template: str) -> bool:
    return all(mark in chat_template for mark in _MARKS)


LLAMA3 = Dialect(
    name="llama3",
    recognises=_recognises,
    envelope=ToolEnvelope(
        call_begin='{"name": "',
        name_end='", "parameters": ',
        call_end="}",
        trigger='{"name": "',
        text_before_calls=False,
        parallel=False,
    ),
    examples=(
        Example(output='A call looks like {"name": "f"}.', text='A call looks like {"name": "f"}.'),
        Example(output='{"nam": "Ada"}', text='{"nam": "Ada"}'),
        Example(
            output='{"name": "get_weather", "parameters": {"city": "Paris", "days": [1, 2]}}',
            calls=(("get_weather", '{"city": "Paris", "days": [1, 2]}'),),
        ),
        Example(
            output='<|python_tag|>{"name": "now", "parameters": {}}',
            calls=(("now", "{}"),),
        ),
    ),
)
