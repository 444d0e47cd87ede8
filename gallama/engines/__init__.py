"""The engines by name. Each is imported when a model asks for it: its libraries may be missing or clash."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol, TypeVar

from gallama.config import ModelSpec
from gallama.embedding import Embedder
from gallama.errors import MissingExtra
from gallama.generation import Engine, ReportProgress


def ignore_progress(_: float) -> None:
    pass


T_co = TypeVar("T_co", covariant=True)


class Loader(Protocol[T_co]):
    def __call__(
        self, spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress
    ) -> T_co:
        """Load a model. Blocks for as long as that takes.

        Raises:
            GallamaError: why it cannot be loaded.
        """
        ...


def _load_by(module: str, needs: str) -> Loader[T_co]:
    """A loader that imports its engine when it is called; some engines import their libraries still later.

    Args:
        module: of the engine, in this package.
        needs: what it stands on, and how to have that.
    """

    def load(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> T_co:
        try:
            engine = import_module(f"gallama.engines.{module}")
            loaded: T_co = engine.load(spec, path, report_progress)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("gallama"):
                raise
            raise MissingExtra(
                f"The {spec.backend} backend needs {needs}. What is missing is {error.name}."
            ) from error
        return loaded

    return load


_LLAMA_CPP = "llama-cpp-python: pip install 'gallama[llama-cpp]'"
_TRANSFORMERS = "transformers and torch: gallama setup transformers"
_EXLLAMAV2 = "exllamav2 and torch with CUDA, in an environment of their own: gallama setup exllamav2"
_EXLLAMAV3 = "exllamav3 and torch with CUDA, in an environment of their own: gallama setup exllamav3"
_INFINITY = "infinity-emb, in an environment of its own: gallama setup embedding"

ENGINES: dict[str, Loader[Engine]] = {
    "llama_cpp": _load_by("llama_cpp", _LLAMA_CPP),
    "transformers": _load_by("transformers", _TRANSFORMERS),
    "exllamav2": _load_by("exllamav2", _EXLLAMAV2),
    "exllamav3": _load_by("exllamav3", _EXLLAMAV3),
    "scripted": _load_by("scripted", "nothing"),
}
"""What makes text."""

EMBEDDERS: dict[str, Loader[Embedder]] = {
    "embedding": _load_by("infinity", _INFINITY),
    "llama_cpp": _load_by("llama_cpp.embedder", _LLAMA_CPP),
    "scripted": _load_by("scripted_embedder", "nothing"),
}
"""What makes vectors of texts, or ranks them."""
