"""What sharing the cores gives: python benchmarks/threads.py [--json FILE] [--rounds N]

Lets workers with SmolLM2 write, two at once and one alone, with cores that they share as they do by
themselves, and with as many threads for each as there are cores (`n_threads`), in turns. Prints tokens per
second, over both workers where there are two, and the ratio: shared / all cores for each. Medians; on a quiet
machine. Ends with an error when one alone has less than LEAST_ALONE of what it has with all cores, or two at
once are not faster for sharing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

from gallama.catalog import resolve_model
from gallama.config import ServerConfig
from gallama.conversation import ChatRequest, Completed, Message
from gallama.engines import ignore_progress
from gallama.engines.processor_cores import usable_cores
from gallama.generation import SamplingSettings
from gallama.pool.launchers.local import LocalLauncher, LocalWorker
from gallama.wire import Ready, stream_chat

ROUNDS = 3
ANSWER_TOKENS = 96
# Two workers with all cores each may take half a second for a token.
FEW_TOKENS = 24
LEAST_ALONE = 0.95

Running = tuple[LocalWorker, Ready]


async def start(stack: AsyncExitStack, arguments: dict[str, Any]) -> Running:
    values = {"model_id": "smollm2-135m", "max_seq_len": 1024, "backend_extra_args": arguments}
    worker = await LocalLauncher().launch(resolve_model(values, ServerConfig()))
    stack.push_async_callback(worker.stop)
    return worker, await worker.ready(ignore_progress)


async def write(running: Running, tokens: int) -> int:
    """How many tokens an answer has."""
    worker, ready = running
    request = ChatRequest(
        request_id="benchmark",
        model="smollm2-135m",
        messages=(Message(role="user", content="Tell me a long story about a llama in the mountains."),),
        max_tokens=tokens,
        sampling=SamplingSettings(temperature=0),
    )
    async with aclosing(stream_chat(ready.address, worker.secret, request)) as events:
        async for event in events:
            if isinstance(event, Completed):
                return event.usage.completion_tokens
    raise RuntimeError("the answer did not end")


async def tokens_per_second(workers: Sequence[Running], tokens: int) -> float:
    """Of all of the workers together, each of which writes one answer."""
    began = time.perf_counter()
    written = await asyncio.gather(*(write(worker, tokens) for worker in workers))
    return sum(written) / (time.perf_counter() - began)


async def measure(rounds: int) -> list[dict[str, Any]]:
    all_cores = {"n_threads": usable_cores()}
    figures = []
    async with AsyncExitStack() as stack:
        sharing = [await start(stack, {}) for _ in range(2)]
        greedy = [await start(stack, all_cores) for _ in range(2)]
        for worker in (*sharing, *greedy):
            await write(worker, ANSWER_TOKENS)  # the prompt is in the cache from here on
        for count in (1, 2):
            tokens = ANSWER_TOKENS if count == 1 else FEW_TOKENS
            pairs = [
                (
                    await tokens_per_second(sharing[:count], ANSWER_TOKENS),
                    await tokens_per_second(greedy[:count], tokens),
                )
                for _ in range(rounds)
            ]
            figures.append(
                {
                    "workers": count,
                    "shared_tokens_per_second": statistics.median(shared for shared, _ in pairs),
                    "all_cores_each_tokens_per_second": statistics.median(each for _, each in pairs),
                    "ratio": statistics.median(shared / each for shared, each in pairs),
                }
            )
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="What sharing the cores gives.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    figures = asyncio.run(measure(options.rounds))
    print(f"{usable_cores()} cores\n\nworkers  shared tokens/s  all cores each tokens/s  ratio")
    for row in figures:
        shared, each = row["shared_tokens_per_second"], row["all_cores_each_tokens_per_second"]
        print(f"{row['workers']:7d} {shared:16.1f} {each:24.1f} {row['ratio']:6.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    alone, together = (row["ratio"] for row in figures)
    return int(alone < LEAST_ALONE or together <= 1)


if __name__ == "__main__":
    sys.exit(main())
