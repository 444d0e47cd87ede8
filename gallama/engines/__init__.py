"""The engines by name. Each is imported when a model asks for it: its libraries may be missing or clash."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from gallama.config import ModelSpec
from gallama.errors import MissingExtra
from gallama.generation import Engine, ReportProgress


def ignore_progress(_: float) -> None:
    pass


class Loader(Protocol):
    def __call__(
        self, spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress
    ) -> Engine:
        """Load a model. Blocks for as long as that takes.

        Raises:
            GallamaError: why it cannot be loaded.
        """
        ...


def _load_llama_cpp(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> Engine:
    try:
        from gallama.engines import llama_cpp
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("llama_cpp"):
            raise
        raise MissingExtra(
            "The llama_cpp backend needs llama-cpp-python: pip install 'gallama[llama-cpp]'."
        ) from error
    return llama_cpp.load(spec, path, report_progress)


def _load_scripted(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> Engine:
    from gallama.engines import scripted

    return scripted.load(spec, path, report_progress)


ENGINES: dict[str, Loader] = {"llama_cpp": _load_llama_cpp, "scripted": _load_scripted}
