"""What flash attention costs or gives on this machine: python benchmarks/flash_attention.py [--json FILE]

Prints, for some lengths of context, how many times as fast reading a prompt and writing an answer are with
it as without it: medians of three rounds, both in one run, on a quiet machine. Source of the figures in
docs/decisions/0003.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path

from gallama.catalog import resolve_model
from gallama.config import ServerConfig
from gallama.engines import ENGINES
from gallama.generation import Engine, GenerationRequest, SamplingSettings

CONTEXT_LENGTHS = (60, 600, 1500)
ANSWER_TOKENS = 40
ROUNDS = 3


def load(flash_attention: bool) -> Engine:
    values = {"model_id": "smollm2-135m", "max_seq_len": 4096}
    model = resolve_model(values | {"backend_extra_args": {"flash_attn": flash_attention}}, ServerConfig())
    return ENGINES["llama_cpp"](model.spec, model.path)


async def measure(engine: Engine, length: int) -> tuple[float, float]:
    """Seconds to the first token, and for each token after it."""
    prompt = engine.tokenize("The llama lives in the mountains and eats grass all day. " * 400)[:length]
    # A seed, so that the prompt is computed each time.
    request = GenerationRequest(
        prompt_token_ids=prompt, max_tokens=ANSWER_TOKENS, sampling=SamplingSettings(temperature=1, seed=1)
    )
    start, first, tokens = time.perf_counter(), 0.0, 0
    async for chunk in engine.generate(request):
        tokens += chunk.sampled_tokens
        if tokens and not first:
            first = time.perf_counter()
    return first - start, (time.perf_counter() - first) / max(tokens - 1, 1)


async def main() -> None:
    parser = argparse.ArgumentParser(description="What flash attention costs or gives on this machine.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    figures = []
    without, with_it = load(False), load(True)
    print("context  reading  writing   (speed with flash attention / without)")
    for length in CONTEXT_LENGTHS:
        rounds = [(await measure(without, length), await measure(with_it, length)) for _ in range(ROUNDS)]
        reading = statistics.median(slow[0] / fast[0] for slow, fast in rounds)
        writing = statistics.median(slow[1] / fast[1] for slow, fast in rounds)
        print(f"{length:7d}  {reading:7.2f}  {writing:7.2f}", flush=True)
        figures.append({"context_tokens": length, "reading": reading, "writing": writing})
    await without.close()
    await with_it.close()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
