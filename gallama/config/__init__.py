"""What to serve and how: the config file, the environment, flags and `-id`, validated and fail-closed."""

from gallama.config.config_file import default_config_path, find_config_file, read_config_file
from gallama.config.default_config import default_config_text, write_default_config
from gallama.config.model_argument import parse_model_argument
from gallama.config.model_spec import (
    SPECULATION_KEYS,
    ModelSpec,
    SamplingDefaults,
    layer_defaults,
    layer_values,
    why_backend_cannot,
)
from gallama.config.problems import validated
from gallama.config.server_config import ServerConfig
from gallama.config.sources import FLAGS, KEY_VARIABLE, load_config

__all__ = [
    "FLAGS",
    "KEY_VARIABLE",
    "SPECULATION_KEYS",
    "ModelSpec",
    "SamplingDefaults",
    "ServerConfig",
    "default_config_path",
    "default_config_text",
    "find_config_file",
    "layer_defaults",
    "layer_values",
    "load_config",
    "parse_model_argument",
    "read_config_file",
    "validated",
    "why_backend_cannot",
    "write_default_config",
]
