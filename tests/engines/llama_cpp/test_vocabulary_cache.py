"""The cache of vocabularies: it saves time, and whatever is wrong with it costs nothing but that time."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from gallama.engines.llama_cpp import bindings
from gallama.engines.llama_cpp.vocabulary_cache import VocabularyTables, cached_tables

TABLES = VocabularyTables(
    made_by="1", texts=(b"a", b"\xff\x00", b"<|end|>"), attributes=(4, 4, 8), end_token_ids=(2,)
)
OTHER = VocabularyTables(made_by="1", texts=(b"b",), attributes=(4,), end_token_ids=())


def fits(tables: VocabularyTables) -> bool:
    return tables == TABLES


def build() -> VocabularyTables:
    return TABLES


def must_not_build() -> VocabularyTables:
    raise AssertionError("the cache has them")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A cache file with TABLES in it."""
    file = tmp_path / "cache" / "vocabularies" / "digest"
    assert cached_tables(file, build, fits) == TABLES
    return file


def test_tables_are_built_once(file: Path) -> None:
    assert cached_tables(file, must_not_build, fits) == TABLES


def test_only_this_user_can_read_and_write_the_file_and_its_folder(file: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def put_something_else_there(file: Path) -> None:
    file.write_bytes(b"#!/bin/sh\n" * 100)


def put_another_models_there(file: Path) -> None:
    file.unlink()
    cached_tables(file, lambda: OTHER, lambda _: True)


def let_others_write(file: Path) -> None:
    file.chmod(0o666)


DAMAGES = (
    truncate,
    empty,
    flip_a_bit,
    put_something_else_there,
    put_another_models_there,
    let_others_write,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_believed_is_replaced(file: Path, damage: Callable[[Path], None]) -> None:
    damage(file)
    with pytest.raises(AssertionError):
        cached_tables(file, must_not_build, fits)
    assert cached_tables(file, build, fits) == TABLES
    assert cached_tables(file, must_not_build, fits) == TABLES


def test_a_folder_in_the_place_of_the_file_is_no_hindrance(file: Path) -> None:
    file.unlink()
    file.mkdir()
    assert cached_tables(file, build, fits) == TABLES
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing half-written is left"


def test_a_pipe_in_the_place_of_the_file_is_no_hindrance(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)
    assert cached_tables(file, build, fits) == TABLES


def test_a_folder_that_cannot_be_made_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert cached_tables(tmp_path / "cache" / "vocabularies" / "digest", build, fits) == TABLES


def test_nothing_half_written_stays_behind(file: Path) -> None:
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def load(path: Path, folder: Path | None) -> bindings.NativeModel:
    bindings.initialize()
    return bindings.NativeModel(path, bindings.ModelOptions(gpu_layers=0, cache_folder=folder))


def test_a_models_vocabulary_is_the_same_from_the_cache(smollm2_path: Path, tmp_path: Path) -> None:
    models = [load(smollm2_path, folder) for folder in (None, tmp_path, tmp_path)]
    fresh, built, cached = (model.read_vocabulary(["hello"]) for model in models)
    assert [path.stat().st_size > 0 for path in tmp_path.iterdir()] == [True]
    for vocabulary in (built, cached):
        assert vocabulary.tokens == fresh.tokens
        assert vocabulary.control_tokens == fresh.control_tokens
        assert vocabulary.end_token_ids == fresh.end_token_ids
        assert vocabulary.fingerprint == fresh.fingerprint
    for model in models:
        model.close()


def test_copies_of_a_model_share_a_file_and_a_model_with_another_header_has_its_own(
    smollm2_path: Path, tmp_path: Path
) -> None:
    content = bytearray(smollm2_path.read_bytes())
    copy, edited = tmp_path / "copy.gguf", tmp_path / "edited.gguf"
    copy.write_bytes(content)
    # A rare token with the same number of letters, as an editor of models would change it in its place.
    place = content.index(b"<gh_stars>")
    content[place : place + 10] = b"<gh_STARS>"
    edited.write_bytes(content)
    for path in (smollm2_path, copy, edited):
        model = load(path, tmp_path / "vocabularies")
        control_tokens = model.read_vocabulary(()).control_tokens
        assert ("<gh_STARS>" in control_tokens) == (path == edited)
        model.close()
    assert len(list((tmp_path / "vocabularies").iterdir())) == 2


def test_tables_of_other_versions_are_made_anew(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(smollm2_path, tmp_path)
    model.read_vocabulary(())
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    monkeypatch.setattr("gallama.__version__", "99.0.0")
    model.read_vocabulary(())
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() != before
    model.close()
