"""The command `gallama`."""

from gallama.cli.command_line import main

__all__ = ["main"]
