"""Which Python runs the worker of a model, and what the environments are built from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from packaging.requirements import Requirement

from gallama.catalog.environments import (
    ENVIRONMENTS,
    RECORD_NAME,
    EnvironmentRecord,
    environment_folder,
    find_interpreter,
    interpreter_in,
    requirements_of,
)
from gallama.config import ModelSpec
from gallama.errors import MissingExtra

EMBEDDING = {"model_id": "any", "backend": "embedding"}


def interpreter_of(home: Path, values: Mapping[str, Any]) -> str:
    return find_interpreter(ModelSpec.model_validate(values), {"GALLAMA_HOME": str(home)})


def make_environment(home: Path, name: str, requirements: tuple[str, ...] | None = None) -> Path:
    """An environment as `gallama setup` leaves it; by default one that is up to date."""
    folder = environment_folder(name, {"GALLAMA_HOME": str(home)})
    interpreter_in(folder).parent.mkdir(parents=True)
    interpreter_in(folder).symlink_to(sys.executable)
    wanted = requirements_of(name) if requirements is None else requirements
    record = EnvironmentRecord(requirements=wanted, python_version="3.11.7")
    (folder / RECORD_NAME).write_bytes(msgspec.json.encode(record))
    return folder


class TestRequirements:
    @pytest.mark.parametrize("name", ENVIRONMENTS)
    def test_every_environment_has_an_extra_of_its_name(self, name: str) -> None:
        assert name in (metadata("gallama").get_all("Provides-Extra") or [])
        assert len(requirements_of(name)) > len(requirements_of("no such extra"))

    def test_are_those_of_gallama_and_of_the_extra_and_no_others(self) -> None:
        names = {Requirement(text).name for text in requirements_of("embedding")}
        assert {"msgspec", "pydantic", "llguidance", "infinity-emb", "torch"} <= names
        assert names.isdisjoint({"llama-cpp-python", "accelerate", "pytest", "gallama"})

    def test_keep_their_other_markers_and_are_what_pip_takes(self) -> None:
        requirements = {Requirement(text).name: Requirement(text) for text in requirements_of("embedding")}
        assert "sys_platform" in str(requirements["uvloop"].marker)
        assert not any("extra" in str(requirement.marker) for requirement in requirements.values())

    def test_of_numpy_leave_only_what_both_can_have(self) -> None:
        specifiers = [
            requirement.specifier
            for requirement in map(Requirement, requirements_of("embedding"))
            if requirement.name == "numpy"
        ]
        assert len(specifiers) == 2
        assert all(specifier.contains("1.26.4") for specifier in specifiers)
        assert not all(specifier.contains("2.0.0") for specifier in specifiers)


class TestInterpreter:
    def test_is_the_one_that_the_model_names(self, tmp_path: Path) -> None:
        make_environment(tmp_path, "embedding")
        assert interpreter_of(tmp_path, {**EMBEDDING, "python": "/its/own/python"}) == "/its/own/python"

    def test_is_that_of_the_backends_environment(self, tmp_path: Path) -> None:
        folder = make_environment(tmp_path, "embedding")
        assert interpreter_of(tmp_path, EMBEDDING) == str(folder / "bin" / "python")

    def test_stays_that_of_the_environment_that_the_link_led_to(self, tmp_path: Path) -> None:
        folder = make_environment(tmp_path, "embedding")
        built = folder.rename(folder.with_name(".embedding-1"))
        folder.symlink_to(built.name)
        assert interpreter_of(tmp_path, EMBEDDING) == str(built / "bin" / "python")

    def test_is_this_one_for_backends_that_need_no_environment(self, tmp_path: Path) -> None:
        assert interpreter_of(tmp_path, {"model_id": "any", "backend": "llama_cpp"}) == sys.executable

    def test_is_this_one_where_the_engine_is_installed_here(self, tmp_path: Path) -> None:
        assert interpreter_of(tmp_path, {"model_id": "any", "backend": "transformers"}) == sys.executable

    def test_that_has_the_engine_is_missing_and_the_command_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(MissingExtra) as raised:
            interpreter_of(tmp_path, EMBEDDING)
        message = raised.value.report().message
        assert "infinity_emb" in message
        assert "`gallama setup embedding`" in message
        assert str(tmp_path / "environments" / "embedding") in message

    def test_of_an_environment_with_other_requirements_is_refused(self, tmp_path: Path) -> None:
        current = requirements_of("embedding")
        make_environment(tmp_path, "embedding", (*current[1:], "left-pad>=1"))
        with pytest.raises(MissingExtra, match="`gallama setup embedding`") as raised:
            interpreter_of(tmp_path, EMBEDDING)
        assert "left-pad>=1" in raised.value.message
        assert current[0] in raised.value.message

    def test_of_an_environment_whose_python_has_been_uninstalled_is_not_used(self, tmp_path: Path) -> None:
        folder = make_environment(tmp_path, "embedding")
        interpreter_in(folder).unlink()
        interpreter_in(folder).symlink_to("/nowhere/python")
        with pytest.raises(MissingExtra, match="there is no environment"):
            interpreter_of(tmp_path, EMBEDDING)

    def test_of_a_folder_without_a_record_is_not_used(self, tmp_path: Path) -> None:
        folder = make_environment(tmp_path, "embedding")
        (folder / RECORD_NAME).write_text("{}")
        with pytest.raises(MissingExtra, match="there is no environment"):
            interpreter_of(tmp_path, EMBEDDING)
