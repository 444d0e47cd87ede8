"""Workers as processes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import psutil

from gallama.bootstrap import command_of
from gallama.catalog import ResolvedModel
from gallama.catalog.environments import find_interpreter
from gallama.errors import ModelLoadFailed, ReportedError
from gallama.wire import LoadFailed, Loading, Ready, WorkerOrder, WorkerReport

if TYPE_CHECKING:
    from gallama.pool.gpus import Placement

logger = logging.getLogger(__name__)

STOP_SECONDS = 3.0
"""How long a worker may take to end by itself, and then after SIGTERM, before it is killed."""

_KEPT_LOG_LINES = 40
_MAX_LINE_BYTES = 16 * 1024
_LAST_OUTPUT_SECONDS = 0.5
# The kernel's limit is 108 bytes on Linux and 104 on macOS, the end mark included.
_MAX_SOCKET_PATH_BYTES = 100
_SECRETS = frozenset({"GALLAMA_API_KEY", "GALLAMA_API_KEYS", "GALLAMA_ADMIN_KEYS", "GALLAMA_KEYS_FILE"})
# What a Python says that is older than 3.11, and does not know how to leave a script's folder out.
_WORDS_OF_AN_OLD_PYTHON = "Unknown option: -P"
_FOR_OWN_INTERPRETER = frozenset({"PYTHONHOME", "PYTHONPATH"})
_REPORTS: msgspec.json.Decoder[WorkerReport] = msgspec.json.Decoder(WorkerReport)


class LocalLauncher:
    """Starts `gallama.worker` of the gateway's own gallama in the interpreter that has the engine."""

    async def launch(self, model: ResolvedModel, placement: Placement | None = None) -> LocalWorker:
        python = find_interpreter(model.spec, os.environ)
        directory = _make_directory(model.name)
        spec = model.spec if placement is None else placement.applied_to(model.spec)
        order = WorkerOrder(
            model_name=model.name,
            model_path=str(model.path),
            spec=spec.model_dump_json(),
            address=_choose_address(directory),
            secret=secrets.token_hex(32),
            log_level=logger.getEffectiveLevel(),
        )
        process = _WorkerProcess(model.name)
        try:
            await asyncio.get_running_loop().subprocess_exec(
                lambda: process,
                *command_of(python, "gallama.worker.__main__"),
                env=_worker_environment(python, {} if placement is None else placement.environment),
                # For one thing, what it starts can be ended with it. For another, Ctrl-C in a terminal must
                # not end the workers before the gateway has let their streams end.
                start_new_session=True,
            )
        except BaseException as error:
            process.kill()
            shutil.rmtree(directory, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise ModelLoadFailed(f"{model.name}: cannot start {python!r}: {error.strerror}.") from error
        process.give_order(order)
        return LocalWorker(model.name, process, order.secret, directory)


class LocalWorker:
    """A worker process of this machine."""

    def __init__(self, model_name: str, process: _WorkerProcess, secret: str, directory: str) -> None:
        self.secret = secret
        self._model_name = model_name
        self._process = process
        self._directory = directory
        self._stopping: asyncio.Task[None] | None = None

    @property
    def process_id(self) -> int:
        return self._process.process_id

    def memory_bytes(self) -> int:
        try:
            process = psutil.Process(self.process_id)
            return sum(_resident_bytes(each) for each in (process, *process.children(recursive=True)))
        except psutil.Error:
            return 0

    async def ready(self, on_progress: Callable[[float], None]) -> Ready:
        self._process.on_progress = on_progress
        ends: set[asyncio.Future[Any]] = {self._process.report, self._process.exit}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._process.on_progress = None  # a load that is given up may still tell of itself
        if not self._process.report.done():
            raise ModelLoadFailed(self._why_it_ended_early(self._process.exit.result()))
        report = self._process.report.result()
        if isinstance(report, LoadFailed):
            raise ReportedError(
                msgspec.structs.replace(report.error, message=_printable(report.error.message))
            )
        return report

    async def exited(self) -> str:
        return await asyncio.shield(self._process.exit)

    async def stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        was_cancelled = False
        while not self._stopping.done():
            try:
                await asyncio.wait({self._stopping})
            except asyncio.CancelledError:
                was_cancelled = True
                self._process.kill()
        if was_cancelled:
            raise asyncio.CancelledError

    async def _stop(self) -> None:
        for end in (self._process.close_input, self._process.terminate, self._process.kill):
            if self._process.exit.done():
                break
            end()
            await asyncio.wait({self._process.exit}, timeout=STOP_SECONDS)
        self._process.kill()
        self._process.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _why_it_ended_early(self, how: str) -> str:
        last_words = " | ".join(self._process.last_lines)
        if last_words.startswith(_WORDS_OF_AN_OLD_PYTHON):
            return (
                f"{self._model_name}: the Python of its worker is older than 3.11, which gallama needs;"
                " name another one as the model's `python`."
            )
        return f"{self._model_name}: the worker {how} before its model was loaded. {last_words}".strip()


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has just ended, or is another user's
        return 0


class _WorkerProcess(asyncio.SubprocessProtocol):
    """Takes apart what a worker process says: reports on its output, log lines on its error output."""

    def __init__(self, model_name: str) -> None:
        loop = asyncio.get_running_loop()
        self.report: asyncio.Future[Ready | LoadFailed] = loop.create_future()
        self.exit: asyncio.Future[str] = loop.create_future()
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LOG_LINES)
        self.on_progress: Callable[[float], None] | None = None
        self._model_name = model_name
        self._transport: asyncio.SubprocessTransport | None = None
        self._open_outputs = {1, 2}
        self._unfinished = {1: b"", 2: b""}

    @property
    def process_id(self) -> int:
        return self._running_transport().get_pid()

    def give_order(self, order: WorkerOrder) -> None:
        self._input().write(msgspec.json.encode(order) + b"\n")

    def close_input(self) -> None:
        self._input().close()

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._running_transport().terminate()

    def kill(self) -> None:
        """End it, and all that it has started, even where it has ended itself."""
        if self._transport is None:
            return
        # It leads a group of its own, which has its number for as long as one of them lives.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process_id, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self._transport.kill()

    def close(self) -> None:
        self._running_transport().close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Another loop's transports are of classes of its own.
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, unfinished = (self._unfinished[fd] + data.replace(b"\r", b"\n")).split(b"\n")
        self._unfinished[fd] = unfinished[-_MAX_LINE_BYTES:]
        for line in lines:
            self._take_line(fd, line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd in self._open_outputs:
            self._take_line(fd, self._unfinished[fd])
            self._open_outputs.discard(fd)
        if not self._open_outputs and self._running_transport().get_returncode() is not None:
            self._settle_exit()

    def process_exited(self) -> None:
        if not self._open_outputs:
            self._settle_exit()
        # A child of the worker may hold the pipes open for as long as it likes.
        asyncio.get_running_loop().call_later(_LAST_OUTPUT_SECONDS, self._settle_exit)

    def _settle_exit(self) -> None:
        if not self.exit.done():
            self.exit.set_result(_describe_exit(self._running_transport().get_returncode()))

    def _take_line(self, fd: int, line: bytes) -> None:
        if not line.strip():
            return
        if fd == 1:
            self._take_report(line)
            return
        text = _printable(line.decode(errors="replace"))
        self.last_lines.append(text)
        logger.info("[%s] %s", self._model_name, text)

    def _take_report(self, line: bytes) -> None:
        try:
            report = _REPORTS.decode(line)
        except msgspec.DecodeError:
            logger.warning(
                "[%s] not a report: %s", self._model_name, _printable(line.decode(errors="replace"))
            )
            return
        if isinstance(report, Loading):
            if self.on_progress is not None and not self.report.done():
                self.on_progress(min(max(report.fraction, 0.0), 1.0))
        elif not self.report.done():
            self.report.set_result(report)

    def _running_transport(self) -> asyncio.SubprocessTransport:
        assert self._transport is not None
        return self._transport

    def _input(self) -> asyncio.WriteTransport:
        return cast("asyncio.WriteTransport", self._running_transport().get_pipe_transport(0))


def _make_directory(model_name: str) -> str:
    try:
        return tempfile.mkdtemp(prefix="gallama-")
    except OSError as error:
        raise ModelLoadFailed(f"{model_name}: no folder for the worker's socket: {error}.") from error


def _choose_address(directory: str) -> str:
    """A socket inside `directory`, which only this user can enter; TCP where that cannot be."""
    path = Path(directory) / "worker.sock"
    if hasattr(socket, "AF_UNIX") and len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return f"unix:{path}"
    return "tcp:127.0.0.1:0"


def _worker_environment(python: str, additions: Mapping[str, str]) -> dict[str, str]:
    """The gateway's environment, without its keys; another interpreter is told nothing of where to find
    modules, as that holds for the gateway's."""
    kept_back = _SECRETS if python == sys.executable else _SECRETS | _FOR_OWN_INTERPRETER
    return {name: value for name, value in os.environ.items() if name not in kept_back} | dict(additions)


def _describe_exit(return_code: int | None) -> str:
    if return_code is None:
        return "has ended"
    if return_code >= 0:
        return f"ended with exit code {return_code}"
    try:
        return f"was killed by {signal.Signals(-return_code).name}"
    except ValueError:
        return f"was killed by signal {-return_code}"


def _printable(text: str) -> str:
    """One line that cannot change the terminal or forge another line of the log."""
    text = text.strip().replace("\t", " ").replace("\n", " | ")
    return "".join(character if character.isprintable() else "?" for character in text)[:_MAX_LINE_BYTES]
