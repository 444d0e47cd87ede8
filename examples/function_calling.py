"""The whole loop of an agent: the model calls a tool, we run it, the model answers with the result.

Every call names a tool of ours and has arguments that fit its schema, so nothing here repairs anything.
Needs a running gateway, as `scripts/run` starts one.
"""

import json
import os
from typing import Any, Literal

from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam

MODEL = os.environ.get("GALLAMA_MODEL", "smollm2-135m")
URL = os.environ.get("GALLAMA_URL", "http://127.0.0.1:8000/v1")


def get_current_weather(location: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """Stands for what a real tool would look up."""
    degrees = 12 if unit == "celsius" else 54
    return json.dumps({"location": location, "temperature": f"{degrees} degrees {unit}", "sky": "clear"})


FUNCTIONS = {"get_current_weather": get_current_weather}
TOOLS: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "get_current_weather",
            "description": "Get the current weather in a given location",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "The city, e.g. Boston", "maxLength": 40},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["location", "unit"],
                "additionalProperties": False,
            },
        },
    }
]
# First a call, then an answer. Put "auto" between them to let a larger model decide, once for each "auto".
TOOL_CHOICES: tuple[Literal["required", "auto", "none"], ...] = ("required", "none")

client = OpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))
question = "What's the weather like in Boston today?"
messages: list[Any] = [
    {"role": "system", "content": "You are a helpful weather reporter. Report what the tools say."},
    {"role": "user", "content": question},
]
print(f"User:   {question}")

for tool_choice in TOOL_CHOICES:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=TOOLS,
        tool_choice=tool_choice,
        parallel_tool_calls=False,  # one call per round; without this, as many as the model likes
        max_tokens=300,
    )
    message = completion.choices[0].message
    messages.append(message)
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        assert call.type == "function"
        print(f"Call:   {call.function.name}({call.function.arguments})")
        result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
        print(f"Result: {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

print(f"Answer: {message.content}")
assert message.content
