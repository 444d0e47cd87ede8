"""Wait until a gateway is ready and show one tool call: python examples/first_tool_call.py [URL].

URL is the server's address, as in http://127.0.0.1:8000. `scripts/run` ends with this.
"""

import argparse
import http.client
import json
import os
import sys
import time
import urllib.request

from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam

MODEL = os.environ.get("GALLAMA_MODEL", "smollm2-135m")
READY_SECONDS = 120

BOOK_TABLE: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "book_table",
        "description": "Book a table in a restaurant.",
        "parameters": {
            "type": "object",
            "properties": {
                "restaurant": {"type": "string", "maxLength": 40},
                "guests": {"type": "integer", "minimum": 1, "maximum": 12},
                "time": {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"},
                "seats": {"enum": ["inside", "terrace"]},
            },
            "required": ["restaurant", "guests", "time", "seats"],
            "additionalProperties": False,
        },
    },
}


def wait_until_ready(url: str, process_id: int | None) -> None:
    """Ends the program when the gateway is gone, or not ready in time."""
    deadline = time.monotonic() + READY_SECONDS
    while not is_ready(url):
        if process_id is not None and not is_alive(process_id):
            sys.exit("The gateway has ended before it was ready; its last words above say why.")
        if time.monotonic() > deadline:
            sys.exit(f"{url}/ready does not answer 200 within {READY_SECONDS} seconds.")
        time.sleep(0.2)
    if process_id is not None and not is_alive(process_id):
        sys.exit(f"The gateway has ended, and another server answers on {url}.")


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # nothing listens yet, or models still load
        return False


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def show_tool_call(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    question = "Book a table at Luigi's for 4 people at 19:30, on the terrace."
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        tools=[BOOK_TABLE],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    choice = completion.choices[0]
    assert choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert choice.model_extra

    print(f"\nRequest:   {question}")
    print(f"Tool:      {call.function.name}")
    print(f"Arguments: {json.dumps(json.loads(call.function.arguments))}")
    print(f"Guarantee: {json.dumps(choice.model_extra['guarantee'])}\n", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Wait until a gateway is ready and show one tool call.")
    arguments.add_argument(
        "url", nargs="?", default="http://127.0.0.1:8000", help="of the server, without /v1"
    )
    arguments.add_argument(
        "--wait-for-process", type=int, metavar="PID", help="give up at once when this process is gone"
    )
    given = arguments.parse_args()
    url = given.url.rstrip("/")
    wait_until_ready(url, given.wait_for_process)
    show_tool_call(url)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says it
