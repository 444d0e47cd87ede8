"""The worker's process: load the model that standard input names, answer until the gateway is gone.

`gallama.bootstrap` runs it, in the Python that has the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from gallama import event_loop
from gallama.config import ModelSpec
from gallama.embedding import Embedder
from gallama.engines import EMBEDDERS, ENGINES, Loader
from gallama.errors import ErrorReport, GallamaError, InvalidConfig
from gallama.generation import Engine, ReportProgress
from gallama.wire import LoadFailed, Loading, Ready, WorkerOrder, WorkerReport
from gallama.worker.serve import Runner, serving

logger = logging.getLogger("gallama.worker")

T = TypeVar("T")

_TELL_SECONDS = 0.25
"""While a model loads, how far it is is told so often."""

_STANDARD_INPUT, _STANDARD_OUTPUT, _STANDARD_ERROR = 0, 1, 2


def main() -> int:
    report_fd = os.dup(_STANDARD_OUTPUT)
    # Libraries print what they like; only reports may reach the gateway's pipe.
    os.dup2(_STANDARD_ERROR, _STANDARD_OUTPUT)
    logging.basicConfig(
        format="%(levelname)s %(name)s: %(message)s", level=os.environ.get("LOG_LEVEL", "INFO")
    )
    order = _read_order()
    threading.Thread(target=_end_with_gateway, args=(order.address,), daemon=True).start()
    try:
        event_loop.run(_load_and_serve(order, report_fd))
    except GallamaError as error:
        _report(report_fd, LoadFailed(error.report()))
    except Exception as error:
        # The process boundary: whatever broke, the gateway hears of it.
        logger.exception("The worker of %s failed.", order.model_name)
        _report(report_fd, LoadFailed(_unexpected_error(order, error)))
    return 1


async def _load_and_serve(order: WorkerOrder, report_fd: int) -> None:
    """Serve for ever.

    Raises:
        GallamaError: the model cannot be loaded.
    """
    spec = ModelSpec.model_validate_json(order.spec)
    engine, runner = await _load(spec, Path(order.model_path), report_fd)
    async with serving(order.address, order.secret, runner, engine.status, engine.probe) as address:
        _report(report_fd, Ready(address=address, context_length=engine.context_length))
        await asyncio.Event().wait()


async def _load(spec: ModelSpec, path: Path, report_fd: int) -> tuple[Engine | Embedder, Runner]:
    """Load the model, and tell how far it is all the while, also where that does not change.

    Raises:
        GallamaError: the model cannot be loaded.
    """
    fraction = 0.0

    def take_progress(loaded: float) -> None:
        nonlocal fraction
        fraction = loaded

    def load() -> tuple[Engine | Embedder, Runner]:
        if spec.model_type == "embedding":
            return _load_embedder(spec, path, take_progress)
        return _load_engine(spec, path, take_progress)

    loading = asyncio.create_task(asyncio.to_thread(load))
    while not loading.done():
        _report(report_fd, Loading(fraction))
        await asyncio.wait({loading}, timeout=_TELL_SECONDS)
    return loading.result()


# Each imports what only it needs: an environment that is made for embedding has no grammars.
def _load_engine(spec: ModelSpec, path: Path, report_progress: ReportProgress) -> tuple[Engine, Runner]:
    from gallama.worker.chat import ChatRunner

    engine = _choose(ENGINES, spec)(spec, path, report_progress)
    return engine, ChatRunner(engine, spec)


def _load_embedder(spec: ModelSpec, path: Path, report_progress: ReportProgress) -> tuple[Embedder, Runner]:
    from gallama.worker.embed import EmbedRunner

    embedder = _choose(EMBEDDERS, spec)(spec, path, report_progress)
    return embedder, EmbedRunner(embedder)


def _choose(loaders: Mapping[str, Loader[T]], spec: ModelSpec) -> Loader[T]:
    """
    Raises:
        InvalidConfig: there is none for the backend.
    """
    if spec.backend not in loaders:
        raise InvalidConfig(f"There is no backend {spec.backend!r}; there are: {', '.join(sorted(loaders))}.")
    return loaders[spec.backend]


def _read_order() -> WorkerOrder:
    """The first line of standard input, read without a buffer: the rest belongs to the watcher."""
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = os.read(_STANDARD_INPUT, 4096)
        if not piece:
            sys.exit("A worker is started by `gallama serve`, which tells it on standard input what to load.")
        line += piece
    return msgspec.json.decode(bytes(line), type=WorkerOrder)


def _end_with_gateway(address: str) -> None:
    """End the process as soon as the gateway is gone, however it went, even while a model loads."""
    while os.read(_STANDARD_INPUT, 4096):
        pass
    kind, _, place = address.partition(":")
    if kind == "unix":
        # A gateway that was killed could not clean up.
        with contextlib.suppress(OSError):
            Path(place).unlink(missing_ok=True)
            Path(place).parent.rmdir()
    os._exit(0)


def _report(report_fd: int, report: WorkerReport) -> None:
    os.write(report_fd, msgspec.json.encode(report) + b"\n")


def _unexpected_error(order: WorkerOrder, error: Exception) -> ErrorReport:
    return ErrorReport(
        status=503,
        type="server_error",
        code="model_load_failed",
        message=f"Loading {order.model_name} failed: {type(error).__name__}: {error}",
    )


if __name__ == "__main__":
    sys.exit(main())
