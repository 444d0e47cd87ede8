"""infinity-emb without gallama: python benchmarks/infinity_in_process.py FOLDER

Started by `benchmarks.embedding` with the Python that has infinity-emb; knows nothing of gallama. Says
"ready" once the model in the folder is loaded. Then, for each line of its input, which is JSON as in

    {"at_once": 64, "requests": [["a sentence"], ["another", "and one more"]]}

embeds the requests, so many at a time, and prints how many seconds that took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from importlib import import_module
from typing import Any


def load(folder: str) -> Any:
    """The engine, as gallama sets it up."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryDirectory() as home:
        os.environ.update(offline, INFINITY_HOME=home)
        infinity = import_module("infinity_emb")
    arguments = infinity.EngineArgs(
        model_name_or_path=folder,
        engine="torch",
        device="cpu",
        dtype="float32",
        batch_size=32,
        trust_remote_code=False,
        bettertransformer=False,
        model_warmup=False,
    )
    return infinity.AsyncEmbeddingEngine.from_args(arguments)


async def embed(engine: Any, requests: list[list[str]], at_once: int) -> float:
    room = asyncio.Semaphore(at_once)

    async def embed_one(sentences: list[str]) -> None:
        async with room:
            await engine.embed(sentences=sentences)

    began = time.perf_counter()
    await asyncio.gather(*map(embed_one, requests))
    return time.perf_counter() - began


async def serve(folder: str) -> None:
    engine = load(folder)
    await engine.astart()
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        work = json.loads(line)
        print(await embed(engine, work["requests"], work["at_once"]), flush=True)
    await engine.astop()


def main() -> int:
    parser = argparse.ArgumentParser(description="infinity-emb without gallama, for benchmarks.embedding.")
    parser.add_argument("folder", metavar="FOLDER", help="of the model")
    asyncio.run(serve(parser.parse_args().folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
