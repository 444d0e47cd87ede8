"""How long a worker takes to start: python benchmarks/start_up.py [--json FILE] [--rounds N]

Starts worker processes as the gateway does, with SmolLM2, in turns without and with the cache of
vocabularies on disk, and asks each for an answer in free text, then for one in JSON. Counted from the launch
of the process are the times to its `Ready` and to its first text; that of the first JSON counts from its own
request. All are medians; the ratio is with the cache / without. Ends with an error when a worker with the
cache takes more than MOST_SECONDS to be ready.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

from gallama.catalog import ResolvedModel, resolve_model
from gallama.config import ServerConfig
from gallama.conversation import AnswerText, ChatRequest, Constraint, Message
from gallama.engines import ignore_progress
from gallama.pool.launchers import RunningWorker
from gallama.pool.launchers.local import LocalLauncher
from gallama.wire import Ready, stream_chat

ROUNDS = 7
MOST_SECONDS = 3.0
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "free text": {},
    "JSON": {"constraints": (Constraint(kind="json_schema", source=SCHEMA),)},
}
MEASURED = ("ready", "first text", "first JSON")

Times = dict[str, float]


async def start(model: ResolvedModel, home: Path) -> Times:
    """Seconds that a worker takes to each of MEASURED, with GALLAMA_HOME there."""
    os.environ["GALLAMA_HOME"] = str(home)
    began = time.perf_counter()
    worker = await LocalLauncher().launch(model)
    try:
        ready = await worker.ready(ignore_progress)
        ready_seconds = time.perf_counter() - began
        await first_text(worker, ready, "free text")
        text_seconds = time.perf_counter() - began
        return {
            "ready": ready_seconds,
            "first text": text_seconds,
            "first JSON": await first_text(worker, ready, "JSON"),
        }
    finally:
        await worker.stop()


async def first_text(worker: RunningWorker, ready: Ready, kind: str) -> float:
    """Seconds to the first text of an answer."""
    request = ChatRequest(
        request_id=kind,
        model="smollm2-135m",
        messages=(Message(role="user", content="Who are you?"),),
        max_tokens=64,
        **SETTINGS[kind],
    )
    began = time.perf_counter()
    async with aclosing(stream_chat(ready.address, worker.secret, request)) as events:
        async for event in events:
            if isinstance(event, AnswerText):
                return time.perf_counter() - began
    raise RuntimeError("the answer has no text")


async def main() -> int:
    parser = argparse.ArgumentParser(description="How long a worker takes to start.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    model = resolve_model({"model_id": "smollm2-135m"}, ServerConfig())
    without: list[Times] = []
    with_cache: list[Times] = []
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept")
        await start(model, kept)
        for number in range(options.rounds):
            without.append(await start(model, Path(folder, str(number))))
            with_cache.append(await start(model, kept))
    figures = [
        {
            "to": name,
            "without_cache_ms": 1e3 * statistics.median(times[name] for times in without),
            "with_cache_ms": 1e3 * statistics.median(times[name] for times in with_cache),
            "ratio": statistics.median(
                warm[name] / cold[name] for cold, warm in zip(without, with_cache, strict=True)
            ),
        }
        for name in MEASURED
    ]
    print(f"{'to':12s} without cache ms  with cache ms  ratio")
    for row in figures:
        without_ms, with_ms = row["without_cache_ms"], row["with_cache_ms"]
        print(f"{row['to']:12s} {without_ms:16.0f} {with_ms:14.0f} {row['ratio']:6.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    slowest = max(times["ready"] for times in with_cache)
    return int(slowest > MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
