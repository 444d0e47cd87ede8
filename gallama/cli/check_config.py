"""`gallama check-config`: is the config file valid, is every model there, and is the keys file valid?"""

from __future__ import annotations

import argparse
import os

from gallama.catalog import known_models
from gallama.config import default_config_path, find_config_file, read_config_file
from gallama.config.keys_file import read_keys_file
from gallama.errors import InvalidConfig


def check_config(arguments: argparse.Namespace) -> int:
    file = arguments.file or find_config_file(os.environ)
    if file is None:
        raise InvalidConfig(f"There is no {default_config_path(os.environ)}; `gallama serve` creates it.")
    config = read_config_file(file)
    known_models(config)
    if config.keys_file is not None:
        read_keys_file(config.keys_file)
    print(f"{file} is valid. Models: {', '.join(config.models) or 'none'}.")
    return 0
