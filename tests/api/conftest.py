"""Real gateways with real workers, which play scripts instead of models."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

START_SECONDS = 30


@dataclass(frozen=True)
class Gateway:
    """A running `gallama serve`."""

    url: str
    process: subprocess.Popen[str]
    log_file: Path

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **options)

    def post(self, body: Mapping[str, Any], **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post("/v1/chat/completions", json=body, **options)

    def state(self, model: str) -> dict[str, Any]:
        """What /ready tells of a model: its instances' states, and how many requests run and wait."""
        with self.client() as client:
            state: dict[str, Any] = client.get("/ready").json()["models"][model]
            return state

    def wait_for(self, model: str, **expected: Any) -> None:
        deadline = time.monotonic() + 5
        while not expected.items() <= (state := self.state(model)).items():
            assert time.monotonic() < deadline, f"{model} is {state}, not {expected}"
            time.sleep(0.02)

    def worker_process_ids(self) -> list[int]:
        listing = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in listing.stdout.split()]

    def log(self) -> str:
        return self.log_file.read_text()


StartGateway = Callable[..., Gateway]


@contextlib.contextmanager
def serving(
    folder: Path,
    models: Mapping[str, Mapping[str, Any]],
    *,
    load: Sequence[str] | None = None,
    flags: Sequence[str] = (),
    server: Mapping[str, Any] | None = None,
) -> Iterator[Gateway]:
    """Serve scripted models.

    Args:
        models: specs by name; `backend_extra_args` may stand beside the spec's keys as "script".
        load: the models to load at the start, all by default; [] loads every model on demand.
    """
    config = folder / "model_config.yaml"
    config.write_text(json.dumps({"_server": server or {}} | {name: _spec(models[name]) for name in models}))
    named = [part for name in (models if load is None else load) for part in ("-id", f"model_id={name}")]
    command = [
        sys.executable,
        "-m",
        "gallama",
        "serve",
        "--config",
        str(config),
        "--port",
        "0",
        *named,
        *flags,
    ]
    log_file = folder / "log"
    environment = os.environ | {"GALLAMA_HOME": str(folder)}
    with log_file.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        yield Gateway(_read_url(process, log_file), process, log_file)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _spec(values: Mapping[str, Any]) -> dict[str, Any]:
    spec = {"backend": "scripted", "model_id": "any", **values}
    spec["backend_extra_args"] = spec.pop("script", {})
    return spec


def _read_url(process: subprocess.Popen[str], log_file: Path) -> str:
    assert process.stdout is not None
    match = re.search(r"http://\S+", process.stdout.readline())
    assert match is not None, log_file.read_text()
    return match[0]


def wait_until_ready(gateway: Gateway, **options: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    with gateway.client(**options) as client:
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline, gateway.log()
            time.sleep(0.05)


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[StartGateway]:
    """Starts gateways of the test's own, and ends them after it."""
    with contextlib.ExitStack() as stack:

        def start(models: Mapping[str, Mapping[str, Any]], *, wait: bool = True, **options: Any) -> Gateway:
            gateway = stack.enter_context(serving(tmp_path, models, **options))
            if wait:
                wait_until_ready(gateway)
            return gateway

        yield start


@pytest.fixture(scope="session")
def serving_gateway() -> Callable[..., contextlib.AbstractContextManager[Gateway]]:
    """`serving`, for fixtures that tests of one file or class share."""
    return serving


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": -2}}\n</tool_call>'
SHARED_MODELS: Mapping[str, Mapping[str, Any]] = {
    "echo": {"aliases": ["parrot"]},
    "caller": {"script": {"reply": CALL}, "prompt_template": "hermes"},
    "slow": {
        "script": {"reply": "x" * 2000, "seconds_per_token": 0.05, "slots": 1},
        "max_concurrent_requests": 1,
        "queue_limit": 1,
    },
    "silent": {
        "script": {"seconds_before_first_token": 60, "slots": 1},
        "max_concurrent_requests": 1,
        "queue_limit": 1,
    },
    "broken": {"script": {"reply": "abcdef", "raise_after_tokens": 3}},
}


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for all tests that leave it as it was."""
    with serving(tmp_path_factory.mktemp("gateway"), SHARED_MODELS) as shared:
        wait_until_ready(shared)
        yield shared
