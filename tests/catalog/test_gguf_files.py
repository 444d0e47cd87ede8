from pathlib import Path

import pytest

from gallama.catalog.gguf_files import find_gguf, model_name_of
from gallama.errors import InvalidConfig


def gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


def test_a_gguf_file_is_itself(tmp_path: Path) -> None:
    assert find_gguf(gguf(tmp_path / "a.gguf")) == tmp_path / "a.gguf"


def test_a_folder_stands_for_its_only_model(tmp_path: Path) -> None:
    gguf(tmp_path / "a.gguf")
    (tmp_path / "README.md").touch()
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"


@pytest.mark.parametrize("asked", ["", "a-00001-of-00002.gguf", "a-00002-of-00002.gguf"])
def test_a_split_model_begins_with_its_first_part(tmp_path: Path, asked: str) -> None:
    first = gguf(tmp_path / "a-00001-of-00002.gguf")
    gguf(tmp_path / "a-00002-of-00002.gguf")
    assert find_gguf(tmp_path / asked) == first


def test_missing_parts_are_named(tmp_path: Path) -> None:
    gguf(tmp_path / "a-00001-of-00003.gguf")
    gguf(tmp_path / "a-00003-of-00003.gguf")
    with pytest.raises(InvalidConfig, match=r"missing: a-00002-of-00003\.gguf\."):
        find_gguf(tmp_path)


def test_several_models_in_a_folder_are_listed(tmp_path: Path) -> None:
    gguf(tmp_path / "b.gguf")
    gguf(tmp_path / "a.Q4.gguf")
    with pytest.raises(InvalidConfig, match=r"several models; name one of the files: a\.Q4\.gguf, b\.gguf"):
        find_gguf(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InvalidConfig, match="has no GGUF file"):
        find_gguf(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04", b"<!doctype html>"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidConfig, match="is not a GGUF file"):
        find_gguf(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/m/Mistral-7B.Q4_K_M.gguf", "Mistral-7B.Q4_K_M"),
        ("/m/big-00001-of-00003.gguf", "big"),
        ("/m/Qwen2.5-7B", "Qwen2.5-7B"),
        ("/m/SMALL.GGUF", "SMALL"),
    ],
)
def test_a_file_is_called_by_its_stem_and_a_folder_by_its_name(path: str, name: str) -> None:
    assert model_name_of(Path(path)) == name
