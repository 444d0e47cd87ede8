"""The stages of the check, in their order. Each runs in a process of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import checks, extension, models, places
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.libraries import (
    DRAFT_TOKENS,
    LOOPS,
    break_a_step,
    computes_side_by_side,
    free_memory,
)
from benchmarks.gpu_check.runner import Stage
from benchmarks.gpu_check.speed import Load, Ours, measure
from gallama.config import ModelSpec
from gallama.engines import ENGINES
from gallama.generation import Engine

REQUESTS = 32
SLOTS_TO_CANCEL = 8
AT_ONCE = (1, 8, 32)
ROUNDS = 3
TOKENS = 128
PAGED_CACHE, UNPAGED_CACHE = 32_768, 4_096
MOST_LEFT_MEGABYTES = 64
"""Of tensors, once a model is unloaded; what CUDA and the libraries keep themselves ends with the process."""
_BACKENDS = {"v2": "exllamav2", "v3": "exllamav3"}


def stages() -> list[Stage]:
    """Those of ExLlamaV3 first: it is the one that goes on being developed."""
    listed = [Stage("models", 180)]
    for engine in ("v3", "v2"):
        build = f"{engine}.build"
        listed += [
            Stage(build, 900),
            Stage(f"{engine}.conformance", 240, needs=(build,)),
            Stage(f"{engine}.checks", 180, needs=("models", build)),
            Stage(f"{engine}.speed", 480, needs=("models", build)),
        ]
    return [*listed, Stage("v3.exl3", 560, needs=("models", "v3.build"))]


def run_stage(name: str, file: Path, seconds: float) -> None:
    """Run one in this process; what it finds is written to the file."""
    findings = Findings(file)
    deadline = time.monotonic() + seconds
    bodies: dict[str, Callable[[], None]] = {"models": partial(models.make, findings)}
    for engine in _BACKENDS:
        bodies |= {
            f"{engine}.build": partial(extension.build, findings, engine),
            f"{engine}.conformance": partial(check_conformance, findings, engine),
            f"{engine}.checks": partial(check_engine, findings, engine),
            f"{engine}.speed": partial(measure_speed, findings, engine, places.MODELS / "large", deadline),
        }
    bodies["v3.exl3"] = partial(measure_exl3, findings, deadline)
    bodies[name]()


def check_conformance(findings: Findings, engine: str) -> None:
    """tests/conformance, with the real engine behind it."""
    report = places.RESULTS / f"{engine}.conformance.xml"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "tests/conformance/test_engines.py", "-q"),
            *("-m", "needs_gpu", "-k", _BACKENDS[engine], f"--junitxml={report}"),
            # What a library warns of when it is imported is no error of ours.
            *("-p", "no:cacheprovider", "-W", "default"),
        ],
        cwd=places.ROOT,
    )
    if not report.exists():
        findings.check("the conformance suite runs", False, code=done.returncode)
        return
    counts, failed = read_report(report)
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    findings.check(
        "the conformance suite passes",
        done.returncode == 0 and passed == counts["tests"] > 0,
        passed=passed,
        **{name: count for name, count in counts.items() if count},
        names=failed,
    )


def read_report(file: Path) -> tuple[dict[str, int], list[str]]:
    """The counts of a report of pytest, and the tests that did not pass, with how the reason begins."""
    (suite,) = ElementTree.parse(file).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.attrib['name']}: {trouble.attrib.get('message', '')[:200]}"
        for case in suite.iter("testcase")
        for trouble in case
        if trouble.tag in ("failure", "error", "skipped")
    ]
    return counts, failed[:8]


def load_engine(engine: str, folder: Path, **settings: Any) -> Engine:
    spec = ModelSpec.model_validate(
        {
            "model_id": str(folder),
            "backend": _BACKENDS[engine],
            "max_concurrent_requests": REQUESTS,
            **settings,
        }
    )
    return ENGINES[_BACKENDS[engine]](spec, folder)


def check_engine(findings: Findings, engine: str) -> None:
    """Load, cancel, break and unload the small model."""
    import torch

    extension.import_library(extension.LIBRARIES[engine])
    torch.cuda.init()
    before = memory()
    folder = places.MODELS / "small"
    loaded = load_engine(engine, folder, cache_size=16_384, max_seq_len=16_384)
    findings.figure("memory_before", before)
    findings.figure("memory_loaded", memory())
    slots = SLOTS_TO_CANCEL if computes_side_by_side(engine) else 1
    asyncio.run(_check_loaded(findings, engine, loaded, slots))
    asyncio.run(loaded.close())
    del loaded
    free_memory()
    after = memory()
    findings.check(
        "unloading gives the memory of the model back",
        after["tensors_mb"] - before["tensors_mb"] <= MOST_LEFT_MEGABYTES,
        memory_after=after,
    )
    check_that_a_process_leaves_nothing(findings, engine, folder)


async def _check_loaded(findings: Findings, engine: str, loaded: Engine, slots: int) -> None:
    await checks.check_load(findings, loaded, count=REQUESTS)
    await checks.check_cancelling(findings, loaded, slots=slots)
    await checks.check_broken_step(findings, loaded, partial(break_a_step, engine), slots=slots)


def memory() -> dict[str, float]:
    """Of the GPU, in megabytes: in tensors, kept by PyTorch, and used by everybody."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return {
        "tensors_mb": round(torch.cuda.memory_allocated() / 10**6, 1),
        "reserved_mb": round(torch.cuda.memory_reserved() / 10**6, 1),
        "used_mb": round((total - free) / 10**6),
    }


def check_that_a_process_leaves_nothing(findings: Findings, engine: str, folder: Path) -> None:
    """A worker's process that loads the model and ends gives all of its memory back."""
    program = (
        "import asyncio; from pathlib import Path;"
        " from benchmarks.gpu_check.stages import load_engine, memory;"
        f" engine = load_engine({engine!r}, Path({str(folder)!r}), max_seq_len=4096);"
        " asyncio.run(engine.probe()); print(memory()['used_mb']); asyncio.run(engine.close())"
    )
    before = memory()["used_mb"]
    done = subprocess.run([sys.executable, "-c", program], cwd=places.ROOT, stdout=subprocess.PIPE, text=True)
    after = memory()["used_mb"]
    findings.check(
        "a process that ends leaves no memory behind",
        done.returncode == 0 and after - before <= MOST_LEFT_MEGABYTES,
        code=done.returncode,
        before_mb=before,
        during_mb=done.stdout.strip().rpartition("\n")[2],
        after_mb=after,
    )


def measure_speed(findings: Findings, engine: str, folder: Path, deadline: float) -> None:
    """The table of one engine over one folder."""
    extension.import_library(extension.LIBRARIES[engine])
    is_paged = computes_side_by_side(engine)
    findings.figure("side_by_side", is_paged)
    if not is_paged:
        findings.figure(
            "note", "flash-attn is missing: exllamav2 computes one text at a time, for us as alone"
        )
    for draft in (False, True):
        _measure_table(findings, engine, folder, deadline, draft=draft, is_paged=is_paged)


def _measure_table(
    findings: Findings, engine: str, folder: Path, deadline: float, *, draft: bool, is_paged: bool
) -> None:
    cache = PAGED_CACHE if is_paged else UNPAGED_CACHE
    settings: dict[str, Any] = {"cache_size": cache, "max_seq_len": UNPAGED_CACHE}
    if draft:
        settings |= {"draft_model_id": str(folder), "num_draft_tokens": DRAFT_TOKENS}
    library = LOOPS[engine](folder, draft=draft, slots=max(AT_ONCE), cache_tokens=cache)
    loaded = load_engine(engine, folder, **settings)
    loads = [
        # A copy of the model guesses right where nothing is left to chance.
        Load(at_once, TOKENS if is_paged else max(16, TOKENS // at_once), temperature=0 if draft else 1)
        for at_once in AT_ONCE
    ]
    try:
        measure(findings, Ours(loaded), library, loads, draft=draft, rounds=ROUNDS, deadline=deadline - 15)
    finally:
        library.close()
        asyncio.run(loaded.close())
        free_memory()


def measure_exl3(findings: Findings, deadline: float) -> None:
    """Quantize the large model to EXL3 with the library's own converter, and measure that."""
    folder = places.MODELS / "large-exl3"
    if not folder.exists():
        _convert(places.MODELS / "large", folder, places.STATE / "conversion")
    findings.check("the library's converter makes an EXL3 folder", folder.exists())
    measure_speed(findings, "v3", folder, deadline)


def _convert(folder: Path, target: Path, work: Path) -> None:
    unfinished = target.with_name(f"{target.name}.unfinished")
    goes_on = (work / "ckpt" / "job.json").exists()
    asked = ["--resume"] if goes_on else ["-i", str(folder), "-o", str(unfinished), "-b", "4"]
    # Noise needs no care: few and short rows to calibrate with.
    calibration = [] if goes_on else ["--cal_rows", "16", "--cal_cols", "1024"]
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "exllamav3.conversion.convert_model", "-w", str(work), *asked, *calibration],
        cwd=places.ROOT,
        env=os.environ | {"COLUMNS": "120"},
        check=True,
    )
    unfinished.rename(target)
