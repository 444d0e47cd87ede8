"""The gateway's own settings, and the models that the config file names.

The attribute docstrings are the text of the generated config file; see `default_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gallama.config.model_spec import ConfigModel, Count, ModelSpec, Number, TextList

RoutingPolicyName = Literal["prefix_affinity", "least_busy", "round_robin"]
Seconds = Annotated[Number, Field(ge=0, le=86_400)]


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
    admin_keys: Annotated[TextList, Field(examples=[["another-long-secret"]], repr=False)] = ()
    """Keys that open everything: where there are any, only these may load, unload and stop models.
    Default: whoever may ask models may manage them."""
    keys_file: Annotated[Path | None, Field(examples=["keys.yaml"])] = None
    """A file of more keys, each with a name and limits of its own, read again when it changes;
    see docs/keys.md. A relative path starts at the folder that the server is started in."""
    strict: bool = False
    """Answer 404 to a name that no model has, even when there is only one model."""
    max_body_bytes: Annotated[Count, Field(ge=1024)] = 32 * 1024 * 1024
    """The largest request that is read."""
    max_connections: Annotated[Count, Field(ge=1)] = 4096
    """Connections that may be open at the same time; more are refused with status 503."""
    policy: RoutingPolicyName = "prefix_affinity"
    """Which of several instances of a model answers. One of: prefix_affinity, least_busy, round_robin.
    With prefix_affinity it is the one that has the longest part of the prompt in its cache, unless it has
    much more to do than the others."""
    auto_load: bool = True
    """Load a model that is known, but not loaded, when it is asked for."""
    max_loaded_models: Annotated[Annotated[Count, Field(ge=1)] | None, Field(examples=[2])] = None
    """Models that may be loaded at the same time; another one takes the place of the idle one that was used
    the longest time ago. Default: no limit but memory."""
    minimum_stay_seconds: Seconds = 10
    """A model stays loaded for so long before another that is waited for may take its place."""
    drain_seconds: Seconds = 30
    """How long running answers may go on when their model is unloaded or the server ends."""
    probe_interval_seconds: Annotated[Seconds, Field(gt=0)] = 15
    """How often each worker is asked for a sign of life."""
    hang_seconds: Annotated[Seconds, Field(gt=0)] = 60
    """A worker that shows no progress for so long is ended and started again."""


class ServerConfig(ServerSettings):
    """Everything that a gateway is started with."""

    models: Mapping[str, ModelSpec] = {}
    """The config file's models by name, each with the `_global` keys merged under its own."""
    model_defaults: Mapping[str, Any] = {}
    """The keys of `_global`, for models that the config file does not name."""
    file: Path | None = None
    """The config file that was read."""

    @property
    def asks_for_keys(self) -> bool:
        """Whether requests must carry a key."""
        return bool(self.api_keys or self.admin_keys or self.keys_file)
