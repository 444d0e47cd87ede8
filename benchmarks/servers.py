"""Servers for the benchmarks: gallama, and llama.cpp's own on the same model. They end with their block."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gallama.catalog import resolve_model
from gallama.config import ServerConfig
from gallama.engines.llama_cpp import bindings
from gallama.engines.processor_cores import usable_cores

FOLDER = Path(__file__).parent
MODEL = "smollm2-135m"
TOOL_TEMPLATE = FOLDER / "hermes_tool_use.jinja"
CONTEXT_TOKENS = 2048
START_SECONDS = 120


@dataclass(frozen=True)
class Server:
    base_url: str
    """Up to and with /v1."""
    process_id: int

    @property
    def worker_ids(self) -> list[int]:
        """The process ids of a gateway's workers, in the order in which they were started."""
        path = Path(f"/proc/{self.process_id}/task/{self.process_id}/children")
        return [int(process_id) for process_id in path.read_text().split()]


def model_path() -> Path:
    return resolve_model({"model_id": MODEL}, ServerConfig()).path


def token_counter() -> Callable[[str], int]:
    """Counts the tokens of a text as the benchmarks' model cuts it."""
    bindings.initialize()
    model = bindings.NativeModel(model_path(), bindings.ModelOptions(gpu_layers=0))
    return lambda text: len(model.tokenize(text.encode(), parse_control_tokens=False))


def settings(slots: int, **more: Any) -> dict[str, Any]:
    """The config of the benchmarks' model: each request has CONTEXT_TOKENS of the cache."""
    sizes = {"max_seq_len": CONTEXT_TOKENS, "cache_size": slots * CONTEXT_TOKENS}
    return {"model_id": MODEL, "max_concurrent_requests": slots} | sizes | more


@contextlib.contextmanager
def serving_gallama(
    models: Mapping[str, Mapping[str, Any]], *, server: Mapping[str, Any] | None = None
) -> Iterator[Server]:
    """A gateway with these models, by the names that clients use, and these settings of its own, ready."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "model_config.yaml"
        config.write_text(json.dumps({"_server": server or {}, **models}))
        names = [part for name in models for part in ("-id", f"model_id={name}")]
        arguments = ["serve", "--config", str(config), "--port", "0", *names]
        with running([sys.executable, "-P", "-m", "gallama", *arguments]) as process:
            assert process.stdout is not None
            found = re.search(r":(\d+)$", process.stdout.readline())
            assert found is not None, "the gateway tells its address"
            address = f"http://127.0.0.1:{found[1]}"
            wait_for(f"{address}/ready", process)
            yield Server(f"{address}/v1", process.pid)


@contextlib.contextmanager
def serving_peer(slots: int, template: Path | None = None) -> Iterator[Server]:
    """llama-server with the same model, slots, context and threads; the rest is as it comes."""
    build = subprocess.run([FOLDER / "build_llama_server"], stdout=subprocess.PIPE, text=True, check=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    arguments = ["-m", str(model_path()), "-t", str(usable_cores()), "-np", str(slots)]
    arguments += ["-c", str(slots * CONTEXT_TOKENS), "--port", str(port), "--log-disable"]
    arguments += ["--chat-template-file", str(template)] if template else []
    with running([build.stdout.strip(), *arguments]) as process:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", process)
        yield Server(f"{address}/v1", process.pid)


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    """Wait until the URL answers with 200.

    Raises:
        RuntimeError: the server has ended, or took too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{url} did not get ready: the server's exit code is {process.poll()}")
