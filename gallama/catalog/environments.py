"""Engines whose requirements clash with others' have Python environments of their own, under gallama's home.

    ~/.gallama/environments/embedding                  leads to the one that was built last
    ~/.gallama/environments/embedding/bin/python
    ~/.gallama/environments/embedding/gallama.json     what it was built from

`gallama setup` builds them, from the extra of the same name. An environment that is found is complete; one
that was built from other requirements than today's is not used.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

import msgspec

from gallama.config import ModelSpec, default_config_path
from gallama.errors import MissingExtra

RECORD_NAME = "gallama.json"
OLDEST_PYTHON = (3, 11)
CANNOT_COMPILE_HERE = 3
"""The exit status of `gallama.engines.cuda_extension` where there is no GPU, or no compiler for one."""

_EXTRA_MARKER = re.compile(r"""(?:;|\band)\s*extra\s*==\s*["'](?P<extra>[^"']+)["']\s*$""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A package that makes an engine better, but cannot be had everywhere."""

    package: str
    module: str
    purpose: str
    """Why to have it, and where it can be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One kind of environment; its extra and the backend that runs in it have its name."""

    name: str
    modules: Sequence[str]
    """What the engine imports."""
    compiled: str | None = None
    """The one of them that compiles a CUDA extension when it is imported for the first time."""
    option: Option | None = None
    """What it may have besides."""
    newest_python: tuple[int, int] | None = None
    """Where some of its requirements cannot be had for later ones."""

    @property
    def command(self) -> str:
        """What builds it."""
        return f"gallama setup {self.name}"


ENVIRONMENTS: Mapping[str, Environment] = {
    environment.name: environment
    for environment in (
        # numpy 1.26, the last before 2, is there for Python 3.12 and older.
        Environment(
            name="embedding",
            modules=("torch", "sentence_transformers", "infinity_emb"),
            newest_python=(3, 12),
        ),
        Environment(name="transformers", modules=("torch", "transformers", "safetensors", "accelerate")),
        Environment(
            name="exllamav2",
            modules=("torch", "safetensors", "tokenizers", "exllamav2"),
            compiled="exllamav2",
            option=Option(
                package="flash-attn",
                module="flash_attn",
                purpose=(
                    "Without flash-attn exllamav2 answers one request after the other; with it, on GPUs from"
                    " Ampere on, many at a time. It is compiled, for up to an hour, or comes as a wheel that"
                    " was built for the same versions of torch, CUDA and Python."
                ),
            ),
        ),
        Environment(
            name="exllamav3",
            modules=("torch", "safetensors", "tokenizers", "exllamav3"),
            compiled="exllamav3",
        ),
    )
}


class EnvironmentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an environment was built from."""

    requirements: tuple[str, ...]
    additions: tuple[str, ...] = ()
    """What its user wanted in it besides, as pip takes it."""
    python_version: str
    """As in 3.11.7."""


def environment_folder(name: str, variables: Mapping[str, str]) -> Path:
    """Where an environment is, or would be.

    Args:
        variables: the process environment, where `GALLAMA_HOME` may be set.
    """
    return default_config_path(variables).parent.absolute() / "environments" / name


def interpreter_in(folder: Path) -> Path:
    """The Python of an environment."""
    return folder / "bin" / "python"


def extensions_folder(folder: Path) -> Path:
    """Where an environment keeps CUDA extensions that are compiled in it."""
    return folder / "torch_extensions"


def requirements_of(extra: str) -> tuple[str, ...]:
    """What gallama itself needs and what the extra adds, as pip takes it.

    Raises:
        MissingExtra: gallama runs from a folder that was not installed, so nothing says what it needs.
    """
    try:
        declared = requires("gallama") or []
    except PackageNotFoundError:
        raise MissingExtra(
            "gallama is not installed as a package, so what its extras need is not known."
            " Install it with pip; `pip install --editable FOLDER` does, too."
        ) from None
    return tuple(sorted(filter(None, (_without_extra(text, extra) for text in declared))))


def read_record(folder: Path) -> EnvironmentRecord | None:
    """What an environment was built from; None where there is none, or none that works."""
    if not interpreter_in(folder).is_file():  # a link whose Python has been uninstalled is none
        return None
    try:
        return msgspec.json.decode((folder / RECORD_NAME).read_bytes(), type=EnvironmentRecord)
    except (OSError, msgspec.DecodeError):
        return None


def find_interpreter(spec: ModelSpec, variables: Mapping[str, str]) -> str:
    """The Python that runs the worker of a model: the one that it names, that of its backend's environment,
    or this process's own.

    Raises:
        MissingExtra: there is no environment, or an outdated one, and the engine is not installed here.
    """
    if spec.python is not None:
        return spec.python
    environment = ENVIRONMENTS.get(spec.backend)
    if environment is None:
        return sys.executable
    folder = environment_folder(environment.name, variables)
    record = read_record(folder)
    if record is not None:
        _check_is_current(environment, record, folder)
        # The link may lead elsewhere by the time that the worker imports something more.
        return str(interpreter_in(folder.resolve()))
    missing = [module for module in environment.modules if find_spec(module) is None]
    if missing:
        raise MissingExtra(
            f"The backend {spec.backend} needs {', '.join(missing)}, which this Python has not, and there is"
            f" no environment with it in {folder}. Build it with `{environment.command}`, or name a Python"
            " that has it as the model's `python`."
        )
    return sys.executable


def _check_is_current(environment: Environment, record: EnvironmentRecord, folder: Path) -> None:
    wanted = requirements_of(environment.name)
    if record.requirements == wanted:
        return
    changed = sorted(set(record.requirements) ^ set(wanted))
    raise MissingExtra(
        f"The environment {folder} was built for another version of gallama: its requirements differ"
        f" ({', '.join(changed)}). Build it anew with `{environment.command}`."
    )


def _without_extra(requirement: str, extra: str) -> str:
    """A requirement without the marker that says which extra it belongs to; "" where that is another one."""
    marker = _EXTRA_MARKER.search(requirement)
    if marker is None:
        return requirement
    return requirement[: marker.start()].strip() if marker["extra"] == extra else ""
