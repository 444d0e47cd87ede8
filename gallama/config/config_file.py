"""The config file: where it is, what it says, and on which line it says what is wrong.

_server: {port: 8000}           # the gateway
_global: {cache_quant: Q8}      # every model
mistral: {model_id: mistral.gguf}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gallama.config.model_spec import ModelSpec, layer_defaults
from gallama.config.problems import KeyPath, explain_unknown_key, validated
from gallama.config.server_config import ServerConfig, ServerSettings
from gallama.config.yaml_lines import Lines, line_of, read_yaml
from gallama.errors import InvalidConfig

FILE_NAMES = ("model_config.yaml", "model_config.yml")
SERVER_SECTION = "_server"
GLOBAL_SECTION = "_global"
# What tells one model from another cannot hold for all of them.
_NOT_GLOBAL = ("model_id", "model_name", "aliases")


def default_config_path(environment: Mapping[str, str]) -> Path:
    """Where the config file is created: in `GALLAMA_HOME`, or in ~/.gallama."""
    home = environment.get("GALLAMA_HOME")
    folder = Path(home).expanduser() if home else Path.home() / ".gallama"
    return folder / FILE_NAMES[0]


def find_config_file(environment: Mapping[str, str]) -> Path | None:
    """The config file that exists, the .yaml before the .yml one; None when there is none."""
    folder = default_config_path(environment).parent
    return next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)


def read_config_file(path: Path) -> ServerConfig:
    """What the file says, with defaults for the rest.

    Raises:
        InvalidConfig: with file, line, key and the allowed values, for all that is wrong in a section.
    """
    document = _Document(path)
    document.check_sections()
    server = validated(ServerSettings, document.section(SERVER_SECTION), document.locate_in(SERVER_SECTION))
    defaults = document.global_values()
    models = {name: document.model(name, defaults) for name in document.model_names()}
    settings = server.model_dump(exclude_unset=True)
    return ServerConfig(**settings, models=models, model_defaults=defaults, file=path)


class _Document:
    """A parsed config file that knows the line of every key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content, self.lines = _parse(path)

    def problem(self, explanation: str, *keys: str | int) -> InvalidConfig:
        return InvalidConfig(f"{self.locate(keys)}: {explanation}")

    def locate(self, keys: KeyPath) -> str:
        """ "FILE, line 12, `mistral.cache_quant`"; a key without a line of its own has its parent's."""
        place = f"{self.path}, line {line_of(keys, self.lines)}"
        return f"{place}, `{'.'.join(map(str, keys))}`" if keys else place

    def locate_in(self, section: str) -> Callable[[KeyPath], str]:
        return lambda keys: self.locate((section, *keys))

    def check_sections(self) -> None:
        for name, values in self.content.items():
            if not isinstance(name, str):
                raise self.problem(f"the name {name!r} is no text; put it in quotes", str(name))
            if name.startswith("_") and name not in (SERVER_SECTION, GLOBAL_SECTION):
                raise self.problem(explain_unknown_key(name, (SERVER_SECTION, GLOBAL_SECTION)), name)
            if values is not None and not isinstance(values, dict):
                raise self.problem("must be a mapping of keys to values", name)

    def section(self, name: str) -> dict[str, Any]:
        return self.content.get(name) or {}

    def model_names(self) -> list[str]:
        return [name for name in self.content if not name.startswith("_")]

    def global_values(self) -> dict[str, Any]:
        values = self.section(GLOBAL_SECTION)
        for key in _NOT_GLOBAL:
            if key in values:
                raise self.problem(f"`{key}` belongs to one model, not to all", GLOBAL_SECTION, key)
        stand_in = {"model_id": GLOBAL_SECTION, **values}
        spec = validated(ModelSpec, stand_in, self.locate_in(GLOBAL_SECTION))
        return spec.model_dump(exclude_unset=True, exclude={"model_id"})

    def model(self, name: str, defaults: Mapping[str, Any]) -> ModelSpec:
        values = layer_defaults(defaults, {"model_id": name, "model_name": name, **self.section(name)})
        return validated(ModelSpec, values, self.locate_in(name))


def _parse(path: Path) -> tuple[dict[Any, Any], Lines]:
    content, lines = read_yaml(path, "config file")
    if content is None:
        return {}, lines
    if not isinstance(content, dict):
        raise InvalidConfig(
            f"{path}: must be a mapping from model names to settings, not {type(content).__name__}"
        )
    return content, lines
