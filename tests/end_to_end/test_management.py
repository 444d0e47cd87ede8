"""A real model is loaded and unloaded over HTTP while the gateway serves others."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gallama.cli import main

MODEL = "smollm2-135m"
LOAD_SECONDS = 60


def call(url: str, method: str, path: str, body: Any = None) -> Any:
    answer = httpx.request(method, url + path, json=body, trust_env=False, timeout=60)
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


@pytest.fixture
def loaded(gateway_url: str) -> Any:
    """What /list_loaded_models tells of a second model that was loaded over HTTP."""
    task = call(
        gateway_url, "POST", "/add_model", {"model_id": MODEL, "model_name": "added", "max_seq_len": 512}
    )
    progress = [task["progress"]]
    deadline = time.monotonic() + LOAD_SECONDS
    while task["status"] in ("queued", "loading"):
        assert time.monotonic() < deadline, task
        time.sleep(0.05)
        task = call(gateway_url, "GET", f"/task_status/{task['task_id']}")
        progress.append(task["progress"])
    assert task["status"] == "completed", task
    assert progress == sorted(progress)
    assert progress[-1] == 1
    listing = call(gateway_url, "GET", "/list_loaded_models")
    return next(model for model in listing["models"] if model["name"] == "added")


def test_a_model_is_loaded_asked_and_unloaded_with_its_memory(
    gateway_url: str, loaded: Any, process_lives: Callable[[int], bool]
) -> None:
    (instance,) = loaded["instances"]
    assert (instance["state"], instance["context_length"]) == ("ready", 512)
    body = {"model": "added", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
    completion = call(gateway_url, "POST", "/v1/chat/completions", body)
    assert completion["model"] == "added"
    assert completion["usage"]["completion_tokens"] > 0
    assert process_lives(instance["process_id"])

    (removed,) = call(gateway_url, "POST", "/remove_model", {"model_name": "added"})["removed"]
    assert (removed["instance"], removed["verified"]) == (instance["instance"], True)
    assert removed["memory_freed_bytes"] > 80 * 2**20  # the weights alone are 98 MB in their file
    assert not process_lives(instance["process_id"])
    names = [model["name"] for model in call(gateway_url, "GET", "/list_models")["models"]]
    assert "added" not in names
    assert MODEL in names


def test_the_command_line_does_the_same(gateway_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        assert main([*arguments, "--url", gateway_url]) == 0
        return capsys.readouterr().out

    said = run("load", f"model_id={MODEL} model_name=by-hand max_seq_len=512")
    assert re.fullmatch(r"by-hand \(instance \d+\) is loaded\n", said)
    heading, *rows = run("ps").splitlines()
    state = heading.index("STATE")
    states = {row.split()[0]: row[state:].split()[0] for row in rows}
    assert states == {MODEL: "ready", "by-hand": "ready"}
    (port,) = (row.split()[2] for row in rows if row.startswith("by-hand"))
    said = run("stop", port)
    assert re.fullmatch(r"by-hand \(instance \d+\) has ended and gave back \d{2,} MB of memory\n", said)
    assert main(["unload", "by-hand", "--url", gateway_url]) == 2
    assert "No model is called 'by-hand'" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_ends_the_command_with_the_reason(
    gateway_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"model_id={MODEL} model_name=wrong backend_extra_args.n_btach=8"
    assert main(["load", spec, "--url", gateway_url]) == 1
    assert "n_btach" in capsys.readouterr().err
