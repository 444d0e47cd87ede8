"""The first version of the config file: every key with its meaning, commented out.

It is made from the settings' own declarations, so that it cannot go stale.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gallama.config.config_file import GLOBAL_SECTION, SERVER_SECTION
from gallama.config.model_spec import ModelSpec, allowed_names
from gallama.config.server_config import ServerSettings
from gallama.config.sources import variable_name
from gallama.errors import InvalidConfig

EXAMPLE_MODEL = "my-model"

_HEAD = f"""\
## The configuration of gallama. `gallama check-config` says whether it is valid.
##
## Lines that begin with ## explain. To use a setting, take the "# " in front of it away, and in front of
## its section's name; a setting that stays commented out has its default.

## The server. Each key can also be given in the environment, as in {variable_name("port")}=8000;
## the environment overrides this file, and a flag of `gallama serve` overrides both.
# {SERVER_SECTION}:
"""

_GLOBAL = f"""
## What holds for every model, unless the model says otherwise: any key of a model but its names.
# {GLOBAL_SECTION}:
#   max_concurrent_requests: {ModelSpec.model_fields["max_concurrent_requests"].default}

## The models: a section for each, under the name that `gallama run NAME` and clients use.
# {EXAMPLE_MODEL}:
"""


def default_config_text() -> str:
    """The commented config file; without its comment signs it is a valid one."""
    return _HEAD + _explain_keys(ServerSettings) + _GLOBAL + _explain_keys(ModelSpec)


def write_default_config(path: Path) -> None:
    """Create the config file, and its folder, readable by its owner alone: it may come to hold API keys.

    Raises:
        InvalidConfig: the file exists, or cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(default_config_text())
    except OSError as error:
        raise InvalidConfig(f"The config file {path} cannot be created: {error.strerror}.") from None


def _explain_keys(model: type[BaseModel]) -> str:
    return "".join(_explain_key(key, field) for key, field in model.model_fields.items())


def _explain_key(key: str, field: FieldInfo) -> str:
    assert field.description, f"`{key}` has no docstring to explain it"
    meaning = field.description.split("\n")
    if allowed := allowed_names(key):
        meaning.append(f"One of: {', '.join(allowed)}.")
    explanation = "".join(f"##   {line.strip()}\n" for line in meaning)
    return f"{explanation}#   {key}: {json.dumps(_example(key, field))}\n"


def _example(key: str, field: FieldInfo) -> object:
    """A value to show: the example if there is one, else the default."""
    return field.examples[0] if field.examples else field.get_default(call_default_factory=True)
