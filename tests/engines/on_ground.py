"""Runs a command of Python's on a ground where a library for GPUs works without one.

    python tests/engines/on_ground.py exllamav3 -P gallama/bootstrap.py gallama.worker.__main__

is what a gateway starts as a worker whose interpreter is one of `interpreter_on_ground`.
"""

from __future__ import annotations

import importlib
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

GROUNDS: Mapping[str, str] = {"exllamav2": "laid_ground", "exllamav3": "without_gpu"}
"""The libraries, and what lays their ground in `tests/engines/LIBRARY/ground.py`."""


def interpreter_on_ground(library: str, folder: Path) -> Path:
    """A program that takes the arguments of a Python interpreter."""
    program = folder / f"python-on-{library}"
    command = shlex.join([sys.executable, str(Path(__file__)), library])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o755)
    return program


def main() -> None:
    _, library, _, script, *arguments = sys.argv
    sys.path[0] = str(Path(__file__).parents[2])
    ground = importlib.import_module(f"tests.engines.{library}.ground")
    lay: Callable[[], object] = getattr(ground, GROUNDS[library])
    sys.argv = [script, *arguments]
    with lay():  # type: ignore[attr-defined]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
