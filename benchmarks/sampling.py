"""What choosing a token costs with exllamav2: python -m benchmarks.sampling [--json FILE] [--rounds N]

Lets our sampler and transformers' processors, as the transformers engine drives them, choose tokens from the
same rows of logits of a large vocabulary, in turns, on one thread of a processor. Prints microseconds for a
token, and the ratio: ours / transformers'. Medians; on a quiet machine. Ends with an error when one setting
takes longer than with transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gallama.engines.exllamav2.sampling import Sampler
from gallama.generation import SamplingSettings

ROUNDS = 5
ROWS = 20
VOCABULARY_SIZE = 152_064

SETTINGS: Mapping[str, SamplingSettings] = {
    "greedy": SamplingSettings(temperature=0),
    "temperature": SamplingSettings(temperature=0.8, seed=1),
    "top_p": SamplingSettings(temperature=0.8, top_p=0.9, seed=1),
    "all": SamplingSettings(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, seed=1),
}

LEADS: Mapping[str, float] = {"sure": 15, "unsure": 0}
"""How sure the model is of its next token."""

Choose = Callable[[NDArray[np.float32]], int]


def make_rows(lead: float) -> list[NDArray[np.float32]]:
    """Noise in which fifty tokens are by `lead` likelier, which is a logarithm."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 2, (ROWS, VOCABULARY_SIZE)).astype(np.float32)
    for row in rows:
        row[rng.integers(0, VOCABULARY_SIZE, 50)] += lead
    return list(rows)


def ours(settings: SamplingSettings) -> Choose:
    sampler = Sampler(settings, prompt_length=1, vocabulary_size=VOCABULARY_SIZE, unused_token_ids=())
    return lambda row: sampler.sample(row, None, [0])


def transformers(settings: SamplingSettings) -> Choose:
    import torch

    from gallama.engines.transformers.sampling import Sampler as TransformersSampler

    torch.set_num_threads(1)
    sampler = TransformersSampler(
        settings,
        prompt_token_ids=[0],
        unused_token_ids=(),
        vocabulary_size=VOCABULARY_SIZE,
        device=torch.device("cpu"),
    )
    return lambda row: sampler.sample(torch.from_numpy(row), None)


def seconds_per_token(choose: Choose, rows: list[NDArray[np.float32]]) -> float:
    start = time.perf_counter()
    for row in rows:
        choose(row)
    return (time.perf_counter() - start) / len(rows)


def measure(settings: SamplingSettings, rows: list[NDArray[np.float32]], rounds: int) -> dict[str, float]:
    sides = (ours(settings), transformers(settings))
    for choose in sides:
        choose(rows[0])
    found = [[seconds_per_token(choose, rows) for choose in sides] for _ in range(rounds)]
    own, theirs = (statistics.median(column) for column in zip(*found, strict=True))
    ratio = statistics.median(one / other for one, other in found)
    return {"microseconds": 1e6 * own, "transformers_microseconds": 1e6 * theirs, "ratio": ratio}


def main() -> int:
    parser = argparse.ArgumentParser(description="What choosing a token costs with exllamav2.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    figures = {
        f"{name}, {how}": measure(settings, make_rows(lead), options.rounds)
        for name, settings in SETTINGS.items()
        for how, lead in LEADS.items()
    }
    print(f"{'settings':20} {'ours us':>9} {'theirs us':>10} {'ratio':>6}")
    for name, found in figures.items():
        own, theirs = found["microseconds"], found["transformers_microseconds"]
        print(f"{name:20} {own:9.0f} {theirs:10.0f} {found['ratio']:6.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(any(found["ratio"] > 1 for found in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
