"""What a path leads to, and which engine loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gallama.catalog import resolve_model
from gallama.catalog.memory_need import TORCH_PROCESS_BYTES, estimate_memory
from gallama.config import ServerConfig
from gallama.errors import InvalidConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as Hugging Face has them, as far as it is looked at before it is loaded."""
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x" * 1000)
    return path


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF")
    return path


def backend_of(path: Path, **values: Any) -> str:
    model = resolve_model({"model_id": str(path), **values}, ServerConfig())
    assert model.path == path
    return model.spec.backend


@pytest.mark.parametrize(
    ("values", "backend"),
    [
        ({}, "transformers"),
        ({"backend": "transformers"}, "transformers"),
        ({"model_type": "embedding"}, "embedding"),
        ({"backend": "embedding"}, "embedding"),
    ],
)
def test_the_engine_for_a_folder(folder: Path, values: dict[str, str], backend: str) -> None:
    assert backend_of(folder, **values) == backend


@pytest.mark.parametrize(
    "values", [{}, {"backend": "llama_cpp"}, {"model_type": "embedding"}, {"backend": "embedding"}]
)
def test_the_engine_for_a_gguf_file(gguf: Path, values: dict[str, str]) -> None:
    assert backend_of(gguf, **values) == "llama_cpp"


def test_a_folder_with_a_gguf_file_is_that_file(folder: Path, gguf: Path) -> None:
    file = gguf.rename(folder / gguf.name)
    assert resolve_model({"model_id": str(folder)}, ServerConfig()).path == file


def test_an_engine_that_cannot_load_it_is_refused(folder: Path, gguf: Path) -> None:
    with pytest.raises(
        InvalidConfig, match=r"llama_cpp cannot load a folder without a GGUF file.*transformers"
    ):
        backend_of(folder, backend="llama_cpp")
    with pytest.raises(InvalidConfig, match=r"transformers cannot load a GGUF file.*llama_cpp"):
        backend_of(gguf, backend="transformers")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"holds no model: it has no GGUF file, and no config\.json"):
        backend_of(tmp_path)


def test_the_memory_of_a_folder_is_that_of_its_weights_and_of_torch(folder: Path) -> None:
    need = estimate_memory(resolve_model({"model_id": str(folder)}, ServerConfig()))
    assert (need.model.weight_bytes, need.gpu_bytes) == (1000, 1000)
    assert need.host_bytes == 1000 + TORCH_PROCESS_BYTES
