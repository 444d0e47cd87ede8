"""`gallama ps`, `load`, `unload`, `stop`: what a running gateway is asked to do.

What other people and files gave names to is shown without characters that could change the terminal.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gallama.cli.gateway_client import GatewayClient, printable
from gallama.config import KEY_VARIABLE, find_config_file, load_config, parse_model_argument
from gallama.errors import InvalidConfig

_POLL_SECONDS = 0.2
_PATH_KEYS = ("model_id", "draft_model_id")
_HEADINGS = (
    "MODEL",
    "INSTANCE",
    "PORT",
    "STATE",
    "RUNNING",
    "WAITING",
    "ANSWERED",
    "MEMORY",
    "CONTEXT",
    "GPUS",
)
_INTERRUPTED_STATUS = 130


def describe_ps(parser: argparse.ArgumentParser) -> None:
    _describe_gateway(parser)
    parser.set_defaults(command=show_models)


def describe_load(parser: argparse.ArgumentParser) -> None:
    _describe_gateway(parser)
    parser.add_argument(
        "spec",
        metavar="SPEC",
        help="as behind `serve -id`: 'model_id=mistral cache_size=8192', or a name alone",
    )
    parser.add_argument("--no-wait", action="store_true", help="do not wait until the model is loaded")
    parser.set_defaults(command=load_model)


def describe_unload(parser: argparse.ArgumentParser) -> None:
    _describe_gateway(parser)
    parser.add_argument("name", metavar="NAME", help="a model's name or alias, or the path it was loaded by")
    parser.set_defaults(command=unload_model)


def describe_stop(parser: argparse.ArgumentParser) -> None:
    _describe_gateway(parser)
    parser.add_argument(
        "name", metavar="NAME|PORT", help="as for `unload`; or one instance, by the port that `ps` shows"
    )
    parser.set_defaults(command=stop_model)


def show_models(arguments: argparse.Namespace) -> int:
    answer = _gateway(arguments).get("/list_models", key="models")
    if arguments.json:
        _print_json(answer)
        return 0
    models = answer["models"]
    rows = [row for model in models for row in _rows_of(model)]
    _print_table([_HEADINGS, *rows])
    for model in models:
        for instance in model["instances"]:
            if instance["problem"]:
                print(printable(f"{model['name']}, instance {instance['instance']}: {instance['problem']}"))
    return 0


def load_model(arguments: argparse.Namespace) -> int:
    """
    Returns:
        The exit status: 1 when the model could not be loaded.
    """
    gateway = _gateway(arguments)
    task = gateway.post("/add_model", _spec_values(arguments.spec), key="task_id")
    if not arguments.no_wait:
        try:
            task = _until_ended(gateway, task)
        except KeyboardInterrupt:
            print(
                f"Not waiting any longer; the gateway goes on with task {task['task_id']}.", file=sys.stderr
            )
            return _INTERRUPTED_STATUS
    if arguments.json:
        _print_json(task)
    else:
        _tell_of_load(task)
    return 1 if task["status"] == "failed" else 0


def unload_model(arguments: argparse.Namespace) -> int:
    answer = _gateway(arguments).post(
        "/remove_model", {"model_id": _whole_path(arguments.name)}, key="removed"
    )
    return _tell_of_removal(arguments, answer)


def stop_model(arguments: argparse.Namespace) -> int:
    if not arguments.name.isdecimal():
        return unload_model(arguments)
    answer = _gateway(arguments).post("/stop_model_by_port", {"port": int(arguments.name)}, key="removed")
    return _tell_of_removal(arguments, answer)


def _describe_gateway(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="the gateway; default: the host and port of the config and environment")
    parser.add_argument(
        "--api-key", dest="api_key", metavar="KEY", help=f"the key to send; default: {KEY_VARIABLE}"
    )
    parser.add_argument("--json", action="store_true", help="print what the gateway answers, as JSON")


def _gateway(arguments: argparse.Namespace) -> GatewayClient:
    """
    Raises:
        InvalidConfig: the configuration is wrong, or says that the gateway takes any free port.
    """
    key = arguments.api_key or os.environ.get(KEY_VARIABLE, "")
    return GatewayClient(url=arguments.url or default_url(os.environ), api_key=key)


def default_url(environment: Mapping[str, str]) -> str:
    """Where a gateway of this configuration listens.

    Raises:
        InvalidConfig: the configuration is wrong, or says that it takes any free port.
    """
    config = load_config(find_config_file(environment), environment, {})
    if config.port == 0:
        raise InvalidConfig("The port is set to 0, any free one; name the gateway's address with --url.")
    host = _reachable(config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _reachable(host: str) -> str:
    """The address to call where one listens on all of the machine's."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "::1" if address.version == 6 else "127.0.0.1"


def _spec_values(text: str) -> dict[str, Any]:
    """The spec to send. Paths that lead somewhere from here are made whole: the gateway has a folder too."""
    values = parse_model_argument(text) if "=" in text else {"model_id": text}
    return {key: _whole_path(value) if key in _PATH_KEYS else value for key, value in values.items()}


def _whole_path(name: str) -> str:
    """A name as it is; what is written as a path, and leads to something, as a whole path."""
    path = Path(name).expanduser()
    is_path = path.name != name or path.suffix.lower() == ".gguf"
    return os.path.abspath(path) if is_path and path.exists() else name


def _until_ended(gateway: GatewayClient, task: dict[str, Any]) -> dict[str, Any]:
    """The task once it has ended; tells on stderr how far it is."""
    told = ""
    while task["status"] in ("queued", "loading"):
        progress = f"{task['status']}, {int(task['progress'] * 10) * 10}%"
        if progress != told:
            print(progress, file=sys.stderr, flush=True)
            told = progress
        time.sleep(_POLL_SECONDS)
        task = gateway.get(f"/task_status/{task['task_id']}", key="task_id")
    return task


def _tell_of_load(task: dict[str, Any]) -> None:
    for model in task["models"]:
        what = f"{model['name']} (instance {model['instance']})"
        if model["status"] == "failed":
            print(printable(f"gallama: {what} could not be loaded: {model['error']}"), file=sys.stderr)
        else:
            words = "is loaded" if model["status"] == "completed" else f"is {model['status']}"
            print(printable(f"{what} {words}"))


def _tell_of_removal(arguments: argparse.Namespace, answer: dict[str, Any]) -> int:
    if arguments.json:
        _print_json(answer)
        return 0
    for removed in answer["removed"]:
        print(printable(_removal(removed)))
    if not answer["removed"]:
        print("It was not loaded.")
    return 0


def _removal(removed: dict[str, Any]) -> str:
    gave_back = [f"{_size(removed['memory_freed_bytes'])} of memory"]
    if removed["gpu_memory_freed_bytes"]:
        gave_back.append(f"{_size(removed['gpu_memory_freed_bytes'])} of GPU memory")
    words = f"{removed['name']} (instance {removed['instance']}) has ended and gave back "
    words += " and ".join(gave_back)
    if not removed["verified"]:
        words += ", which could not be verified"
    if removed["cut_requests"]:
        words += f"; running answers that were cut: {removed['cut_requests']}"
    return words


def _rows_of(model: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each instance; waiting counts for the model, and stands in its first row."""
    return [
        (
            model["name"],
            str(instance["instance"]),
            str(instance["port"]),
            _state(instance),
            f"{instance['busy']}/{instance['capacity']}",
            str(model["waiting"]) if index == 0 else "",
            str(instance["served"]),
            _size(instance["memory_bytes"]) if instance["memory_bytes"] else "-",
            str(instance["context_length"] or "-"),
            ",".join(map(str, instance["gpus"])) or "-",
        )
        for index, instance in enumerate(model["instances"])
    ]


def _state(instance: dict[str, Any]) -> str:
    is_loading = instance["state"] == "starting"
    return f"starting {instance['progress']:.0%}" if is_loading else str(instance["state"])


def _size(count: int) -> str:
    return f"{count / 10**9:.1f} GB" if count >= 10**9 else f"{count / 10**6:.0f} MB"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(printable(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2))
