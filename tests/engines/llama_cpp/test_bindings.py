from __future__ import annotations

import random

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from gallama.engines.llama_cpp.bindings import _returnable_memory

MEBIBYTE = 1 << 20


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_the_memory_of_dropped_snapshots_goes_back_to_the_system() -> None:
    rng = random.Random(0)
    before = resident_bytes()
    snapshots: list[NDArray[np.uint8]] = []
    for _ in range(600):
        snapshots.append(_returnable_memory(rng.randrange(MEBIBYTE // 8, 2 * MEBIBYTE)))
        snapshots[-1][:] = 1
        if len(snapshots) > 60:
            del snapshots[rng.randrange(20)]
    for _ in range(5):
        rng.shuffle(snapshots)
        del snapshots[len(snapshots) // 2 :]
        held = sum(snapshot.nbytes for snapshot in snapshots)
        assert resident_bytes() - before < held + 4 * MEBIBYTE


def test_a_snapshot_that_finds_no_memory_says_so() -> None:
    with pytest.raises(MemoryError):
        _returnable_memory(1 << 60)
