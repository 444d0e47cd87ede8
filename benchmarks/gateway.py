"""What the gateway adds: python benchmarks/gateway.py [--json FILE] [--rounds N]

Serves the scripted engine, which takes no time for a token, so that what remains is what gallama adds.

- The first token: the same request over HTTP and, in turns with it, over the wire straight to a worker. The
  gateway's part is the difference of the medians.
- A streamed token: the processor time, user and system, that the gateway and its worker take for each, while
  STREAMS streams come, a token in SECONDS_PER_TOKEN each. The worker's part has the scripted engine in it.
- Whole answers: how many a second AT_ONCE clients get, and the processor time of one.

This process is the client, and is not counted. The figures are medians over the rounds; the machine should be
quiet. Reads /proc, so it runs on Linux only. Ends with an error when the gateway's part of a first token is
over MOST_OF_FIRST_TOKEN seconds, or of a streamed one over MOST_OF_TOKEN.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gallama.catalog import resolve_model
from gallama.config import ServerConfig
from gallama.conversation import AnswerText, ChatRequest, Message
from gallama.engines import ignore_progress
from gallama.pool.launchers.local import LocalLauncher
from gallama.wire import Ready, stream_chat

MOST_OF_FIRST_TOKEN, MOST_OF_TOKEN = 1e-3, 1e-4
FIRST_TOKENS = 100
STREAMS, SECONDS_PER_TOKEN, START_SECONDS, WINDOW_SECONDS = 64, 0.05, 1.0, 4.0
AT_ONCE, ANSWERS_EACH = 16, 25
PROMPT = "Say it."
LETTER = b"Q"
"""What the engine says: it stands nowhere else in an answer, so that counting it counts tokens."""

MODELS: Mapping[str, Mapping[str, Any]] = {
    name: {
        "model_id": "any",
        "backend": "scripted",
        "max_concurrent_requests": STREAMS,
        "backend_extra_args": script,
    }
    for name, script in {
        "instant": {"reply": 3 * LETTER.decode()},
        "paced": {"reply": 4000 * LETTER.decode(), "seconds_per_token": SECONDS_PER_TOKEN},
    }.items()
}


@dataclass(frozen=True)
class Gateway:
    """A running `gallama serve`."""

    process_id: int
    port: int

    @property
    def cpu_seconds(self) -> tuple[float, float]:
        """What the gateway and its workers have taken so far."""
        listing = Path(f"/proc/{self.process_id}/task/{self.process_id}/children").read_text()
        workers = sum(cpu_seconds(int(process_id)) for process_id in listing.split())
        return cpu_seconds(self.process_id), workers


def cpu_seconds(process_id: int) -> float:
    """User and system time of all threads of a process."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving() -> Iterator[Gateway]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "model_config.yaml"
        config.write_text(json.dumps(MODELS))
        names = [part for name in MODELS for part in ("-id", f"model_id={name}")]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gallama", "serve", "--config", str(config), "--port", "0", *names],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout as output:
            try:
                found = re.search(r":(\d+)$", output.readline())
                assert found is not None, "the gateway tells its address"
                yield Gateway(process.pid, int(found[1]))
            finally:
                process.terminate()
                process.wait()


class Client:
    """One HTTP connection that does as little as it can: its own work would look like the gateway's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unread = b""
        self.tokens = 0

    def get(self, path: str) -> None:
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def ask(self, model: str, *, stream: bool) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "stream": stream}
        raw = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(raw)}\r\n\r\n"
        )
        self._writer.write(head.encode() + raw)

    async def read_until(self, mark: bytes) -> bytes:
        """What comes up to a mark, and with it; the rest is for the next time."""
        while (end := self._unread.find(mark)) < 0:
            self._unread += await self._read()
        seen, self._unread = self._unread[: end + len(mark)], self._unread[end + len(mark) :]
        return seen

    async def count_tokens(self) -> None:
        while True:
            self.tokens += (await self._read()).count(LETTER)

    async def _read(self) -> bytes:
        data = await self._reader.read(2**16)
        assert data, "the gateway hangs up on nobody"
        return data


@contextlib.asynccontextmanager
async def connected(gateway: Gateway) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


async def wait_until_ready(gateway: Gateway) -> None:
    async with connected(gateway) as client:
        client.get("/ready")
        while b'"status":"ready"' not in await client.read_until(b'"models"'):
            await asyncio.sleep(0.05)
            client.get("/ready")


async def over_http(client: Client) -> float:
    """Seconds to the first token."""
    began = time.perf_counter()
    client.ask("instant", stream=True)
    await client.read_until(LETTER)
    seconds = time.perf_counter() - began
    await client.read_until(b"\r\n0\r\n\r\n")
    return seconds


async def over_the_wire(worker: Ready, secret: str) -> float:
    """Seconds to the first token."""
    request = ChatRequest(request_id="r", model="m", messages=(Message(role="user", content=PROMPT),))
    began = time.perf_counter()
    seconds = 0.0
    async with aclosing(stream_chat(worker.address, secret, request)) as events:
        async for event in events:
            if isinstance(event, AnswerText) and not seconds:
                seconds = time.perf_counter() - began
    return seconds


async def measure_first_token(gateway: Gateway) -> dict[str, float]:
    worker = await LocalLauncher().launch(resolve_model(MODELS["instant"], ServerConfig()))
    http, wire = [], []
    try:
        ready = await worker.ready(ignore_progress)
        async with connected(gateway) as client:
            for _ in range(FIRST_TOKENS):
                http.append(await over_http(client))
                wire.append(await over_the_wire(ready, worker.secret))
    finally:
        await worker.stop()
    return {
        "first_token_http_ms": 1e3 * statistics.median(http),
        "first_token_wire_ms": 1e3 * statistics.median(wire),
        "first_token_gateway_ms": 1e3 * (statistics.median(http) - statistics.median(wire)),
    }


async def measure_streams(gateway: Gateway) -> dict[str, float]:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(gateway)) for _ in range(STREAMS)]
        reading = [asyncio.create_task(client.count_tokens()) for client in clients]
        try:
            for client in clients:
                client.ask("paced", stream=True)
            await asyncio.sleep(START_SECONDS)
            assert all(client.tokens for client in clients), "every stream has begun"
            before, received = gateway.cpu_seconds, sum(client.tokens for client in clients)
            await asyncio.sleep(WINDOW_SECONDS)
            after, tokens = gateway.cpu_seconds, sum(client.tokens for client in clients) - received
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
    return {
        "tokens_per_second": tokens / WINDOW_SECONDS,
        "token_gateway_us": 1e6 * (after[0] - before[0]) / tokens,
        "token_worker_us": 1e6 * (after[1] - before[1]) / tokens,
    }


async def measure_answers(gateway: Gateway) -> dict[str, float]:
    async def ask_often() -> None:
        async with connected(gateway) as client:
            for _ in range(ANSWERS_EACH):
                client.ask("instant", stream=False)
                await client.read_until(b'"reasoning_tokens":0}}}')

    before, began = gateway.cpu_seconds, time.perf_counter()
    await asyncio.gather(*(ask_often() for _ in range(AT_ONCE)))
    after, seconds = gateway.cpu_seconds, time.perf_counter() - began
    answers = AT_ONCE * ANSWERS_EACH
    return {
        "answers_per_second": answers / seconds,
        "answer_gateway_us": 1e6 * (after[0] - before[0]) / answers,
        "answer_worker_us": 1e6 * (after[1] - before[1]) / answers,
    }


async def measure(rounds: int) -> dict[str, float]:
    """The medians over the rounds."""
    with serving() as gateway:
        await wait_until_ready(gateway)
        await measure_answers(gateway)  # warms up
        figures = [await measure_all(gateway) for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in figures) for name in figures[0]}


async def measure_all(gateway: Gateway) -> dict[str, float]:
    first_token = await measure_first_token(gateway)
    return first_token | await measure_streams(gateway) | await measure_answers(gateway)


def print_table(figures: Mapping[str, float]) -> None:
    print("                          over HTTP  over the wire  the gateway")
    names = ("first_token_http_ms", "first_token_wire_ms", "first_token_gateway_ms")
    print("first token, ms          {:10.2f} {:14.2f} {:12.2f}\n".format(*(figures[name] for name in names)))
    print("processor time, us       the gateway     the worker   per second")
    for row in ("token", "answer"):
        gateway, worker = figures[f"{row}_gateway_us"], figures[f"{row}_worker_us"]
        print(f"{row:22s} {gateway:13.0f} {worker:14.0f} {figures[f'{row}s_per_second']:12.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description="What the gateway adds.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures = asyncio.run(measure(options.rounds))
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    misses_first = figures["first_token_gateway_ms"] > 1e3 * MOST_OF_FIRST_TOKEN
    return int(misses_first or figures["token_gateway_us"] > 1e6 * MOST_OF_TOKEN)


if __name__ == "__main__":
    sys.exit(main())
