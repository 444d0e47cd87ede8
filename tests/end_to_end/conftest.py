"""The real thing: `gallama serve` as a process, its worker, and the embedded model.

Tests that leave the gateway as it was use the one of `gateway_url`; `start_gateway` starts others.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

MODEL = "smollm2-135m"
START_SECONDS = 60
STOP_SECONDS = 15


@dataclass(frozen=True)
class RunningGateway:
    """A `gallama serve` with one instance of the embedded model."""

    url: str
    """As in http://127.0.0.1:8000; the API is under /v1."""
    process: subprocess.Popen[str]
    log_file: Path

    def worker_process_ids(self) -> list[int]:
        listing = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in listing.stdout.split()]

    def engine_steps(self, model: str) -> int:
        """How many forward passes the engine of a model has made so far."""
        time.sleep(0.6)  # what is told of workers is of the last half second
        metrics = httpx.get(f"{self.url}/metrics", trust_env=False).text
        counter = rf'^gallama_engine_steps_total{{.*model="{re.escape(model)}".*}} (\S+)$'
        found = re.search(counter, metrics, re.MULTILINE)
        assert found is not None, metrics
        return int(float(found[1]))

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            assert self.process.poll() is None, f"The gateway has ended:\n{self.log_file.read_text()}"
            assert time.monotonic() < deadline, f"The gateway is not ready:\n{self.log_file.read_text()}"
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        return httpx.get(f"{self.url}/ready", trust_env=False).status_code == 200


@contextlib.contextmanager
def serving(folder: Path, *flags: str, settings: str | None = "") -> Iterator[RunningGateway]:
    """Serve the embedded model on a free port; at the end no process of it may be left.

    Args:
        flags: more flags of `gallama serve`.
        settings: more of the model's `-id`, as in "max_seq_len=512"; None: the flags name a model.
    """
    model = [] if settings is None else ["-id", f"model_id={MODEL} {settings}"]
    command = [sys.executable, "-m", "gallama", "serve", *model, "--port", "0", *flags]
    log_file = folder / "gateway.log"
    with (
        log_file.open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(folder)
        ) as process,
    ):
        try:
            gateway = RunningGateway(_read_url(process, log_file), process, log_file)
            gateway.wait_until_ready()
            yield gateway
            _stop(gateway)
        finally:
            process.kill()


ServingGateway = Callable[..., contextlib.AbstractContextManager[RunningGateway]]


def _environment(folder: Path) -> dict[str, str]:
    """Ours, without the settings that whoever runs the tests has for his own gateway."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GALLAMA_")}
    return own | {"GALLAMA_HOME": str(folder)}


def _read_url(process: subprocess.Popen[str], log_file: Path) -> str:
    assert process.stdout is not None
    match = re.search(r"http://\S+", process.stdout.readline())
    assert match is not None, log_file.read_text()
    return match[0]


def _stop(gateway: RunningGateway) -> None:
    worker_process_ids = gateway.worker_process_ids()
    gateway.process.terminate()
    gateway.process.wait(STOP_SECONDS)
    left_over = [process_id for process_id in worker_process_ids if lives(process_id)]
    assert not left_over, f"Workers outlive their gateway: {left_over}"


def lives(process_id: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(process_id)], capture_output=True, text=True)
    return listing.stdout.strip()[:1] not in ("", "Z")


@pytest.fixture(scope="session")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with serving(tmp_path_factory.mktemp("gateway")) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def gateway_url(shared_gateway: RunningGateway) -> str:
    """The address of a gateway that all tests share, without /v1."""
    return shared_gateway.url


@pytest.fixture(scope="session")
def gateway_process(shared_gateway: RunningGateway) -> subprocess.Popen[str]:
    """The process of the gateway at `gateway_url`."""
    return shared_gateway.process


@pytest.fixture(scope="session")
def client(gateway_url: str) -> Iterator[OpenAI]:
    """OpenAI's own client, for the gateway at `gateway_url`."""
    with OpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


@pytest.fixture(scope="session")
def serving_gateway() -> ServingGateway:
    """`serving`, for fixtures that tests of one file share."""
    return serving


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[Callable[..., RunningGateway]]:
    """Starts gateways of the test's own, with the arguments of `serving`, and ends them after it."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, settings: str = "") -> RunningGateway:
            return stack.enter_context(serving(tmp_path, *flags, settings=settings))

        yield start


@pytest.fixture(scope="session")
def process_lives() -> Callable[[int], bool]:
    return lives
