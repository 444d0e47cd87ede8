"""The check of the engines that need a GPU: scripts/gpu_check pack|compile|run; see docs/gpu_check.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import extension, places, toolkit, wheels
from benchmarks.gpu_check.runner import Result, Runner, Stage, exit_code, sum_up

SECONDS = 540
"""Of a command that may take ten minutes, with what comes before the first stage and after the last."""
_MACHINE_BOUND = ("models", "build")
"""What these made is gone with the machine."""
_MOST_LOG_BYTES = 15 * 2**20


def pack() -> int:
    """Fill the folder that is carried to the machine."""
    from benchmarks.gpu_check.models import pack_tokenizer

    try:
        packed = wheels.pack(
            wheels.roots(places.ROOT / "pyproject.toml"), places.WHEELS, wheels.fetch_with_pip
        )
    except wheels.CannotPack as error:
        print(error, file=sys.stderr)
        return 1
    tokenizer = pack_tokenizer(places.TOKENIZER)
    for file in (*packed, tokenizer):
        print(f"{file.stat().st_size / 10**6:7.2f} MB  {file.name}")
    size = sum(file.stat().st_size for file in places.CARRIED.rglob("*") if file.is_file())
    print(f"{size / 10**6:7.2f} MB  in all, in {places.CARRIED.relative_to(places.ROOT)}")
    return 0


def run(asked: Sequence[Stage], every: Sequence[Stage], *, seconds: float, again: bool) -> int:
    """Run stages, bring back what came of them, and print the summary as the last line."""
    names = {distribution.name for distribution in distributions()}
    if lacking := wheels.missing(wheels.ALREADY_THERE, names):
        print(f"This machine lacks {', '.join(lacking)}; add them to the roots in wheels.py.", flush=True)
    take_back(places.BACK, places.RESULTS)
    told, out = versions(), places.out()

    def keep(results: Mapping[str, Result]) -> None:
        bring_back(sum_up(results, every, told), out)

    runner = Runner(places.RESULTS, seconds=seconds, environment=environment(), keep=keep)
    # The stage that is under way is ended, too, and what was found before lies where it is brought back from.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    runner.run(asked, again=again)
    keep(runner.results)
    summary = sum_up(runner.results, every, told)
    print(json.dumps(summary), flush=True)
    return exit_code(summary, asked)


def compile_ahead(engines: Sequence[str], architecture: str) -> int:
    """Compile extensions into the folder that is carried to the machine."""
    major, minor = (int(number) for number in architecture.split("."))
    for engine in engines:
        try:
            parts = extension.compile_ahead(engine, (major, minor), environment())
        except extension.CannotCompile as error:
            print(error, file=sys.stderr)
            return 1
        for part in parts:
            print(f"{part.stat().st_size / 10**6:7.2f} MB  {part.name}")
    return 0


def select(names: Sequence[str], every: Sequence[Stage]) -> list[Stage]:
    """The stages that are named, by an engine or each, and what these need; all of them where none is named.

    Raises:
        ValueError: there is no such stage.
    """
    known = {name for stage in every for name in (stage.name, stage.engine)}
    if unknown := sorted(set(names) - known):
        raise ValueError(
            f"no such stage: {', '.join(unknown)}; there are {', '.join(stage.name for stage in every)}"
        )
    if not names:
        return list(every)
    named = [stage for stage in every if {stage.name, stage.engine} & set(names)]
    chosen = {name for stage in named for name in (stage.name, *stage.needs)}
    return [stage for stage in every if stage.name in chosen]


def take_back(folder: Path, results: Path) -> None:
    """What an earlier machine found counts here, but for what stayed on it."""
    file = folder / "gpu_check.json"
    if (results / "results.json").exists() or not file.exists():
        return
    stages = json.loads(file.read_text())["stages"]
    kept = {name: result for name, result in stages.items() if name.rpartition(".")[2] not in _MACHINE_BOUND}
    results.mkdir(parents=True, exist_ok=True)
    (results / "results.json").write_text(json.dumps(kept))


def bring_back(summary: dict[str, Any], out: Path) -> None:
    """At most eight files, each below 16 MiB: the summary, the logs, and the parts of the extensions."""
    (out / "gpu_check.json").write_text(json.dumps(summary, indent=2) + "\n")
    logs = sorted(places.RESULTS.glob("*.log"))
    joined = b"\n".join(b"=== " + log.stem.encode() + b"\n" + log.read_bytes() for log in logs)
    (out / "logs.txt").write_bytes(joined[-_MOST_LOG_BYTES:])
    for part in sorted(places.BUILT.glob("*.xz.*")):
        shutil.copy(part, out / part.name)


def environment() -> dict[str, str]:
    """Of the stages: where extensions are compiled, for which GPU, and with how many processes."""
    variables = {
        "TORCH_EXTENSIONS_DIR": str(places.EXTENSIONS),
        "MAX_JOBS": str(os.cpu_count() or 1),
        "GALLAMA_HOME": str(places.STATE / "home"),
        "PYTHONUNBUFFERED": "1",
    }
    variables |= toolkit.settings(os.environ, places.STATE / "lib")
    architecture = gpu().get("architecture")
    return variables | ({"TORCH_CUDA_ARCH_LIST": architecture} if architecture else {})


def gpu() -> dict[str, Any]:
    """The first one, as the driver tells; {} where there is none."""
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return {
            "gpu": pynvml.nvmlDeviceGetName(handle),
            "architecture": f"{major}.{minor}",
            "driver": pynvml.nvmlSystemGetDriverVersion(),
        }
    except pynvml.NVMLError as error:
        return {"gpu": f"none: {error}"}


def versions() -> dict[str, Any]:
    packages = ("torch", "triton", "exllamav2", "exllamav3", "llguidance", "transformers", "flash-attn")
    return {
        "python": platform.python_version(),
        "processor_cores": os.cpu_count(),
        "nvcc": nvcc(),
        **gpu(),
        **{name: _version(name) for name in packages},
    }


def nvcc() -> str | None:
    """Its version; None where it is not found by its name."""
    program = shutil.which("nvcc")
    if program is None:
        return None
    told = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", told)
    return found[1] if found else told[-100:]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description="Check the engines that need a GPU."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack", help="fill .gpu_check with what the machine with the GPU lacks")
    running = commands.add_parser("run", help="run the check; its last line is a summary in JSON")
    running.add_argument("names", nargs="*", metavar="STAGE", help="v3, v2, or a stage of one; default: all")
    running.add_argument("--seconds", type=float, default=SECONDS, help="for all; default: %(default)s")
    running.add_argument("--again", action="store_true", help="run what has held before, too")
    ahead = commands.add_parser("compile", help="compile extensions on a machine without a GPU")
    ahead.add_argument("engines", nargs="+", choices=list(extension.LIBRARIES))
    ahead.add_argument("--architecture", default="9.0", help="of the GPU; default: %(default)s, an H100's")
    one = commands.add_parser("stage", help="run one stage in this process")
    one.add_argument("name")
    one.add_argument("--file", type=Path, required=True)
    one.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args(arguments)
    if options.command == "pack":
        return pack()
    if options.command == "compile":
        return compile_ahead(options.engines, options.architecture)
    from benchmarks.gpu_check.stages import run_stage, stages

    if options.command == "stage":
        run_stage(options.name, options.file, options.seconds)
        return 0
    every = stages()
    try:
        asked = select(options.names, every)
    except ValueError as error:
        parser.error(str(error))
    return run(asked, every, seconds=options.seconds, again=options.again)


if __name__ == "__main__":
    sys.exit(main())
