"""What a path leads to, and which engine that is for: a GGUF file, or a folder as Hugging Face has them."""

from __future__ import annotations

from pathlib import Path

from gallama.catalog.gguf_files import find_gguf
from gallama.config import ModelSpec
from gallama.errors import InvalidConfig

CONFIG_FILE = "config.json"
"""Stands in every folder of Hugging Face's form, and says what model it is."""


def find_model(path: Path) -> Path:
    """What to load for a file or folder that exists: a GGUF file, as `find_gguf` finds it, or the folder.

    Raises:
        InvalidConfig: it holds no model.
    """
    if not path.is_dir() or _has_gguf(path):
        return find_gguf(path)
    if (path / CONFIG_FILE).is_file():
        return path
    raise InvalidConfig(f"The folder {path} holds no model: it has no GGUF file, and no {CONFIG_FILE}.")


def engine_for(spec: ModelSpec, path: Path) -> str:
    """The backend that loads it.

    Args:
        path: as `find_model` gives it.

    Raises:
        InvalidConfig: the spec asks for one that cannot.
    """
    if spec.backend == "scripted":
        return spec.backend
    fitting = _engine_of_folder(spec) if path.is_dir() else "llama_cpp"
    # Whoever asks for vectors need not know which engine makes them of a GGUF file.
    if spec.backend in ("auto", "embedding", fitting):
        return fitting
    raise InvalidConfig(
        f"model {spec.model_id!r}: the backend {spec.backend} cannot load"
        f" {'a folder without a GGUF file' if path.is_dir() else 'a GGUF file'}; leave `backend` out, or use"
        f" {fitting}."
    )


def _engine_of_folder(spec: ModelSpec) -> str:
    return "embedding" if spec.model_type == "embedding" else "transformers"


def _has_gguf(folder: Path) -> bool:
    try:
        return any(file.suffix.lower() == ".gguf" for file in folder.iterdir())
    except OSError as error:
        raise InvalidConfig(f"The folder {folder} cannot be read: {error.strerror}.") from None
