"""Load a model while the server runs, ask it, and unload it again.

Needs a running gateway, as `scripts/run` starts one. Where that has admin keys, OPENAI_API_KEY must be one.
"""

import json
import os
import time
from typing import Any
from urllib.request import Request, urlopen

from openai import OpenAI

MODEL = os.environ.get("GALLAMA_MODEL", "smollm2-135m")
URL = os.environ.get("GALLAMA_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "none")


def call(path: str, body: object = None) -> Any:
    """A GET, or with a body a POST; an error status is an exception."""
    request = Request(
        URL + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urlopen(request) as answer:
        return json.load(answer)


task = call("/add_model", {"model_id": MODEL, "model_name": "second", "max_seq_len": 1024})
while task["status"] in ("queued", "loading"):
    time.sleep(0.2)
    task = call(f"/task_status/{task['task_id']}")
assert task["status"] == "completed", task["error"]

for model in call("/list_loaded_models")["models"]:
    for instance in model["instances"]:
        megabytes = instance["memory_bytes"] / 2**20
        print(f"Loaded:  {model['name']}, instance {instance['instance']}, {megabytes:.0f} MB")

client = OpenAI(base_url=URL, api_key=KEY)
completion = client.chat.completions.create(
    model="second", messages=[{"role": "user", "content": "Say hello."}], max_tokens=20
)
print(f"Answer:  {completion.choices[0].message.content}")

for removed in call("/remove_model", {"model_name": "second"})["removed"]:
    megabytes = removed["memory_freed_bytes"] / 2**20
    print(f"Removed: {removed['name']}, which gave back {megabytes:.0f} MB")
