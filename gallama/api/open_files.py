"""Open files: the system counts connections among them, and allows a process only so many."""

from __future__ import annotations

import logging
import sys

from gallama.config import ServerConfig
from gallama.errors import InvalidConfig

logger = logging.getLogger(__name__)

_OTHER_FILES = 256
"""Of the gateway itself: libraries, pipes to workers, the log."""
_FILES_PER_CONNECTION = 2
"""A client's, and while its request runs one to the worker."""


def make_room(config: ServerConfig) -> int:
    """Let this process have as many open files as its connections may need.

    Returns:
        The connections that may be open: `max_connections`, or fewer where the system allows fewer and
        nobody has asked for that number.

    Raises:
        InvalidConfig: the system does not allow as many as were asked for.
    """
    if sys.platform == "win32":  # no such limit there
        return config.max_connections
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = connections_within(config, sys.maxsize if hard == resource.RLIM_INFINITY else hard)
    needed = connections * _FILES_PER_CONNECTION + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return connections


def connections_within(config: ServerConfig, max_files: int) -> int:
    """The connections that may be open where a process may have so many files.

    Raises:
        InvalidConfig: fewer than were asked for.
    """
    possible = max(max_files - _OTHER_FILES, 0) // _FILES_PER_CONNECTION
    if config.max_connections <= possible:
        return config.max_connections
    way_out = "raise the limit of open files (`ulimit -Hn`, LimitNOFILE of systemd)"
    if "max_connections" in config.model_fields_set or possible == 0:
        raise InvalidConfig(
            f"max_connections is {config.max_connections}, but this process may have {max_files} open files,"
            f" enough for {possible} connections: lower it, or {way_out}."
        )
    logger.warning(
        "At most %d connections instead of %d: this process may have %d open files. For more, %s",
        possible,
        config.max_connections,
        max_files,
        way_out,
    )
    return possible
