"""What can be written behind `gallama`, and which function does it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gallama
from gallama.cli.check_config import check_config
from gallama.cli.plan import describe_plan
from gallama.cli.remote import describe_load, describe_ps, describe_stop, describe_unload
from gallama.cli.serve import serve
from gallama.cli.setup import describe_setup
from gallama.errors import GallamaError
from gallama.logs import log_to_stderr


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words behind `gallama`; None: those of this process.

    Returns:
        The exit status; 2 for what the user can put right, with the reason on stderr.
    """
    arguments = build_parser().parse_args(argv)
    log_to_stderr(arguments.log_format, is_verbose=arguments.verbose)
    try:
        status: int = arguments.command(arguments)
    except GallamaError as error:
        print(f"gallama: {error.report().message}", file=sys.stderr)
        return 2
    return status


def build_parser() -> argparse.ArgumentParser:
    # Abbreviated flags are refused everywhere: a flag to come could change what one means.
    parser = argparse.ArgumentParser(
        prog="gallama", description="Local models behind an OpenAI-compatible API.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gallama {gallama.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, describe, help_text in (
        ("serve", _describe_serve, "start the gateway and the models named"),
        ("run", _describe_run, "start the gateway and one model, by its name or path"),
        ("ps", describe_ps, "list the models of a running gateway"),
        ("load", describe_load, "load a model into a running gateway"),
        ("unload", describe_unload, "unload a model of a running gateway, when its answers have ended"),
        ("stop", describe_stop, "unload a model, or one of its instances"),
        ("plan", describe_plan, "estimate the memory that a model takes, and say whether it fits"),
        ("check-config", _describe_check_config, "say whether the config file is valid"),
        ("setup", describe_setup, "build the environment of an engine that needs one of its own"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        command.add_argument("-v", "--verbose", action="store_true", help="log more")
        command.add_argument(
            "--log-format", choices=("text", "json"), default="text", help="how to log; default text"
        )
        describe(command)
    return parser


def _describe_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-id",
        dest="models",
        action="append",
        default=[],
        metavar="'KEY=VALUE ...'",
        help="a model to load, as in -id 'model_id=mistral cache_size=8192'; may be repeated",
    )
    parser.add_argument("--host", help="the address to listen on; default 127.0.0.1")
    parser.add_argument("-p", "--port", help="the port to listen on; default 8000, 0 for a free one")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the config file")
    parser.add_argument(
        "--llm-api-config",
        type=Path,
        metavar="FILE",
        help="the config.yaml of LLM-API, whose model is loaded; LLM_API_* variables go over it",
    )
    parser.add_argument("--strict", action="store_const", const=True, help="404 for a name that no model has")
    parser.add_argument(
        "--api-key",
        dest="api_keys",
        action="append",
        metavar="KEY",
        help="a key that requests must carry; may be repeated",
    )
    parser.add_argument(
        "--admin-key",
        dest="admin_keys",
        action="append",
        metavar="KEY",
        help="a key that may also manage models; may be repeated",
    )
    parser.set_defaults(command=serve, name=None)


def _describe_run(parser: argparse.ArgumentParser) -> None:
    _describe_serve(parser)
    parser.add_argument("name", metavar="NAME", help="a name from the config file, a path, an embedded model")


def _describe_check_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="default: the one `serve` reads")
    parser.set_defaults(command=check_config)
