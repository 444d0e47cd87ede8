"""What the log says of requests: who answered and how it ended, and not a word of their text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

StartGateway = Callable[..., Any]


def body_for(model: str, content: str = "my secret") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}]}


def wait_for_line(gateway: Any, *words: str) -> str:
    """A line of the log that has all the words."""
    deadline = time.monotonic() + 5
    while True:
        for line in gateway.log().splitlines():
            if all(word in line for word in words):
                return str(line)
        assert time.monotonic() < deadline, gateway.log()
        time.sleep(0.05)


def test_each_request_is_one_line_with_its_id(start_gateway: StartGateway) -> None:
    gateway = start_gateway({"echo": {}})
    gateway.post(body_for("echo"), headers={"x-request-id": "mine-1"})
    line = wait_for_line(gateway, "outcome=completed")
    assert re.search(
        r" INFO \[mine-1\] gallama\.api\.request_log:"
        r" operation=chat model=echo instance=1 outcome=completed ",
        line,
    )
    assert re.search(r" completion_tokens=9 .* seconds=\d", line)
    assert "secret" not in gateway.log()


def test_an_answer_that_breaks_is_told_with_its_error(start_gateway: StartGateway) -> None:
    gateway = start_gateway({"broken": {"script": {"raise_after_tokens": 1}}})
    gateway.post(body_for("broken"))
    assert "outcome=failed code=internal_error" in wait_for_line(gateway, "model=broken")


def test_what_happens_to_a_model_is_not_told_in_the_name_of_the_request_that_has_added_it(
    start_gateway: StartGateway,
) -> None:
    gateway = start_gateway({"first": {}})
    with gateway.client(headers={"x-request-id": "mine-3"}) as client:
        client.post("/add_model", json={"model_id": "first"})
        assert wait_for_line(gateway, "first (instance 2) is ready").count("mine-3") == 0
        client.post("/remove_model", json={"model_id": "first"})
    for instance in (1, 2):
        wait_for_line(gateway, "[mine-3]", f"first (instance {instance}) has ended and gave back")


def test_as_json_every_line_is_an_object_whatever_clients_send(start_gateway: StartGateway) -> None:
    key = "a-long-secret-key"
    gateway = start_gateway(
        {"echo": {}}, flags=["--log-format", "json", "--api-key", key, "-v"], load=["echo"], wait=False
    )
    headers = {"authorization": f"Bearer {key}"}
    deadline = time.monotonic() + 30
    while (
        answer := gateway.post(body_for("echo"), headers=headers | {"x-request-id": "mine-2"})
    ).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    with gateway.client(headers=headers) as client:
        client.get("/v1/models/%0d%0a%1b[31m{%22level%22:%22ERROR%22}")
    gateway.post(body_for('x"}\n{"level": "ERROR"'), headers=headers)
    wait_for_line(gateway, "completed", "mine-2")
    lines = [json.loads(line) for line in gateway.log().splitlines()]
    assert {line["level"] for line in lines} <= {"DEBUG", "INFO", "WARNING"}
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    (told,) = [
        line for line in lines if line.get("outcome") == "completed" and line["request_id"] == "mine-2"
    ]
    assert (told["model"], told["instance"], told["completion_tokens"]) == ("echo", 1, 9)
    assert told["seconds"] >= told["first_token_seconds"] >= told["queue_seconds"] >= 0
    assert key not in gateway.log()
    assert "my secret" not in gateway.log()
