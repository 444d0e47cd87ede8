"""Answers as they are written: text piece by piece, then a tool call whose arguments grow.

Needs a running gateway, as `scripts/run` starts one.
"""

import json
import os

from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam

MODEL = os.environ.get("GALLAMA_MODEL", "smollm2-135m")
URL = os.environ.get("GALLAMA_URL", "http://127.0.0.1:8000/v1")

SEND_POSTCARD: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "send_postcard",
        "description": "Send a postcard to a friend.",
        "parameters": {
            "type": "object",
            "properties": {
                "friend": {"type": "string", "maxLength": 20},
                "message": {"type": "string", "maxLength": 80},
            },
            "required": ["friend", "message"],
            "additionalProperties": False,
        },
    },
}

client = OpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))

print("Text:", end=" ", flush=True)
pieces = 0
with client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "Tell me a story about a llama in three sentences."}],
    max_tokens=120,
    stream=True,
    stream_options={"include_usage": True},
) as text_stream:
    for chunk in text_stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
            pieces += 1
        if chunk.usage is not None:
            print(f"\n({chunk.usage.completion_tokens} tokens in {pieces} pieces)")
assert pieces > 1, "the answer comes in pieces"

print("\nCall:", end=" ", flush=True)
arguments = ""
with client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "Tell Ana in a postcard that I like the mountains of Peru."}],
    tools=[SEND_POSTCARD],
    tool_choice="required",
    parallel_tool_calls=False,
    stream=True,
) as call_stream:
    for chunk in call_stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.function is not None
            if call.function.name:  # it comes once, in front of all arguments
                print(call.function.name, end=" ", flush=True)
            print(call.function.arguments or "", end="|", flush=True)
            arguments += call.function.arguments or ""
print()
assert json.loads(arguments).keys() == {"friend", "message"}, "the pieces add up to the arguments promised"
