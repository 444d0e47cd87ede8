"""A conversation: each request carries the whole of it, and the server computes only what is new.

Needs a running gateway, as `scripts/run` starts one.
"""

import os

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

MODEL = os.environ.get("GALLAMA_MODEL", "smollm2-135m")
URL = os.environ.get("GALLAMA_URL", "http://127.0.0.1:8000/v1")

client = OpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))
conversation: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are a friendly biologist. Answer in one short sentence."}
]


def ask(question: str) -> int:
    """Shows the answer and remembers it; returns how many tokens of the prompt were in the cache."""
    conversation.append({"role": "user", "content": question})
    completion = client.chat.completions.create(model=MODEL, messages=conversation, max_tokens=100)
    answer, usage = completion.choices[0].message.content, completion.usage
    assert answer
    assert usage
    assert usage.prompt_tokens_details
    conversation.append({"role": "assistant", "content": answer})

    cached_tokens = usage.prompt_tokens_details.cached_tokens or 0
    print(f"You:   {question}")
    print(f"Model: {answer}")
    print(f"       ({usage.prompt_tokens} tokens read, {cached_tokens} of them from the cache)")
    return cached_tokens


ask("Where do llamas live?")
assert ask("What do they eat there?") > 0, "the second question finds the first in the cache"
