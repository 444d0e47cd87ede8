"""The three sources of the server's settings: the file, over it the environment, over that the flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from gallama.config.config_file import read_config_file
from gallama.config.problems import KeyPath, explain_unknown_key, validated
from gallama.config.server_config import ServerConfig, ServerSettings
from gallama.errors import InvalidConfig

PREFIX = "GALLAMA_"
KEY_VARIABLE = "GALLAMA_API_KEY"
"""The key that commands send to a running gateway."""
# Read elsewhere: the folder of the config file, and what clients send.
OTHER_VARIABLES = ("GALLAMA_HOME", KEY_VARIABLE)
FLAGS = {
    "host": "--host",
    "port": "--port",
    "strict": "--strict",
    "api_keys": "--api-key",
    "admin_keys": "--admin-key",
}


def load_config(
    file: Path | None, environment: Mapping[str, str], flags: Mapping[str, object]
) -> ServerConfig:
    """The server's configuration.

    Args:
        file: the config file; None when there is none.
        environment: all environment variables.
        flags: settings from the command line; the keys are those of `FLAGS`.

    Raises:
        InvalidConfig: a source has an unknown key or a value that is not allowed; the message says which.
    """
    config = read_config_file(file) if file else ServerConfig()
    from_environment = _given(_server_variables(environment), lambda keys: variable_name(str(keys[0])))
    from_flags = _given(flags, lambda keys: FLAGS[str(keys[0])])
    return config.model_copy(update={**from_environment, **from_flags})


def variable_name(key: str) -> str:
    """The environment variable that overrides a setting of the server."""
    return f"{PREFIX}{key}".upper()


def _given(values: Mapping[str, object], locate: Callable[[KeyPath], str]) -> dict[str, object]:
    """The values, validated, without the defaults of the settings that are not given."""
    settings = validated(ServerSettings, values, locate)
    return {key: getattr(settings, key) for key in settings.model_fields_set}


def _server_variables(environment: Mapping[str, str]) -> dict[str, str]:
    keys = {variable_name(key): key for key in ServerSettings.model_fields}
    ours = [name for name in environment if name.startswith(PREFIX) and name not in OTHER_VARIABLES]
    for name in ours:
        if name not in keys:
            raise InvalidConfig(f"environment: {explain_unknown_key(name, [*keys, *OTHER_VARIABLES])}")
    return {keys[name]: environment[name] for name in ours}
