"""The gateway's own settings, and the models that the config file names.

The attribute docstrings are the text of the generated config file; see `default_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gallama.config.model_spec import ConfigModel, Count, ModelSpec, TextList


def _refuse_blanks(text: object) -> object:
    if isinstance(text, str) and (not text or any(character.isspace() for character in text)):
        raise ValueError("must not be empty or hold blanks")
    return text


class ServerSettings(ConfigModel):
    """The keys of `_server`, of the environment (`GALLAMA_<KEY>`) and of the flags."""

    host: Annotated[str, BeforeValidator(_refuse_blanks)] = "127.0.0.1"
    """The address to listen on; 0.0.0.0 for all of the machine's. Default: this machine only."""
    port: Annotated[Count, Field(le=65535)] = 8000
    """The port to listen on; 0 for a free one."""
    api_keys: Annotated[TextList, Field(examples=[["a-long-secret"]], repr=False)] = ()
    """Every request must carry one of these keys, as `Authorization: Bearer KEY`. Default: none asked for."""
    strict: bool = False
    """Answer 404 to a name that no model has, even when there is only one model."""
    max_body_bytes: Annotated[Count, Field(ge=1024)] = 32 * 1024 * 1024
    """The largest request that is read."""


class ServerConfig(ServerSettings):
    """Everything that a gateway is started with."""

    models: Mapping[str, ModelSpec] = {}
    """The config file's models by name, each with the `_global` keys merged under its own."""
    model_defaults: Mapping[str, Any] = {}
    """The keys of `_global`, for models that the config file does not name."""
    file: Path | None = None
    """The config file that was read."""
