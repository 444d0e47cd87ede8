"""What it costs when sequences share the cache's cells: python benchmarks/kv_layout.py, on a quiet machine.

Computes the same steps with SmolLM2 in a cache whose cells all sequences share, and in one where each has its
own: medians, in milliseconds, both layouts in turns in one run. Source of the figures in docs/decisions/0015.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gallama.catalog import resolve_model
from gallama.config import ServerConfig
from gallama.engines.llama_cpp import bindings
from gallama.engines.llama_cpp.options import context_options, model_options, read_options

SEQUENCES, CELLS_EACH = 24, 768
TEXT_TOKENS, IDLE_TOKENS = 300, 550
STEPS, ROUNDS = 12, 3


@dataclass(frozen=True)
class Work:
    """Steps of one kind: how many tokens each sequence gets in a step."""

    name: str
    tokens: Sequence[int]
    idle_sequences: int = 0
    steps: int = STEPS


WORKS = (
    Work("1 answer", [1]),
    Work("1 answer beside 6,600 idle tokens", [1], idle_sequences=12),
    Work("8 answers", [1] * 8),
    Work("7 answers, and 128 tokens of a prompt", [1] * 7 + [128], steps=1),
    Work("8 answers with forced runs of 1 to 4 tokens", [1, 2, 3, 4] * 2),
)


class Cache:
    """One context, filled with texts of random tokens."""

    def __init__(self, model: bindings.NativeModel, options: bindings.ContextOptions) -> None:
        self._context = bindings.NativeContext(model, options)
        self._lengths: dict[int, int] = {}
        self._rng = np.random.default_rng(0)

    def fill(self, work: Work) -> None:
        """Forget everything, and read the texts that the work goes on from."""
        self._context.clear()
        self._lengths.clear()
        at_work = len(work.tokens)
        for sequence in range(at_work + work.idle_sequences):
            self._append([sequence], [TEXT_TOKENS if sequence < at_work else IDLE_TOKENS])

    def seconds_per_step(self, work: Work) -> float:
        times = []
        for _ in range(work.steps):
            start = time.perf_counter()
            self._append(range(len(work.tokens)), work.tokens)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _append(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        for start in range(0, max(counts), 512):
            pieces = [min(512, count - start) for count in counts]
            self._decode(sequences, pieces)

    def _decode(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        ids = np.repeat(np.array(sequences, dtype=np.int32), counts)
        starts = [self._lengths.get(sequence, 0) for sequence in sequences]
        positions = [start + place for start, n in zip(starts, counts, strict=True) for place in range(n)]
        wanted = np.zeros(len(ids), dtype=np.int8)
        wanted[np.cumsum(counts) - 1] = 1
        tokens = self._rng.integers(100, 40_000, len(ids)).astype(np.int32)
        self._context.decode(ids, np.array(positions, dtype=np.int32), tokens, wanted)
        for sequence, start, count in zip(sequences, starts, counts, strict=True):
            self._lengths[sequence] = start + count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    spec, path = (model := resolve_model({"model_id": "smollm2-135m"}, ServerConfig())).spec, model.path
    options = read_options(spec)
    bindings.initialize()
    native = bindings.NativeModel(path, model_options(spec, options))
    for_context = replace(
        context_options(spec, options, CELLS_EACH),
        cells=SEQUENCES * CELLS_EACH,
        sequences=SEQUENCES,
    )
    shared, divided = (Cache(native, replace(for_context, shares_cells=shares)) for shares in (True, False))
    figures = {}
    print("ms a step: shared  divided  ratio")
    for work in WORKS:
        shared.fill(work)
        divided.fill(work)
        rounds = [(shared.seconds_per_step(work), divided.seconds_per_step(work)) for _ in range(ROUNDS)]
        one, other = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(own / common for common, own in rounds)
        figures[work.name] = {"shared_ms": one, "divided_ms": other, "ratio": ratio}
        print(f"{one:17.1f} {other:8.1f} {ratio:6.2f}  {work.name}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
