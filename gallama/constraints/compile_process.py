"""A helper process that compiles what may take minutes or gigabytes, and is killed when it does.

A thread that ran too long could not be stopped, and memory that one request took would be everybody's. The
helper starts when it is first needed, stays for the next compile, and ends with the process that started it.
"""

from __future__ import annotations

import math
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

from gallama.bootstrap import command_of
from gallama.errors import ConstraintTooComplex, GallamaError, WorkerBusy

COMPILE_SECONDS = 5.0
COMPILE_BYTES = 1 << 30
RESULT_BYTES = 64 << 20
START_SECONDS = 60.0
WAIT_SECONDS = 10.0

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class CompileProcess:
    """Runs functions, one at a time, in a process of their own. Safe to use from many threads."""

    def __init__(
        self,
        prepare: Callable[[], object] | None = None,
        *,
        limit_seconds: float = COMPILE_SECONDS,
        limit_bytes: int = COMPILE_BYTES,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """
        Args:
            prepare: run in each new process before anything else; what it takes is not counted.
            wait_seconds: how long a compile waits for those before it.
        """
        self._prepare = prepare
        self._limit_seconds = limit_seconds
        self._limit_bytes = limit_bytes
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._stop: Callable[[], object] = _nothing_to_stop

    def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """What the function returns; it and all that goes in and out must be picklable.

        Raises:
            ConstraintTooComplex: it needs more than the limits.
            WorkerBusy: others take too long.
            Exception: what the function raised.
        """
        job = pickle.dumps((function, args, kwargs))
        if not self._lock.acquire(timeout=self._wait_seconds):
            raise WorkerBusy("Too many constraints are being compiled.", retry_after_seconds=1.0)
        try:
            answer = self._exchange(job)
        finally:
            self._lock.release()
        kind, value = pickle.loads(answer)
        if kind == "raised":
            raise value
        result: Result = value
        return result

    def close(self) -> None:
        """End the process; the next compile starts another."""
        with self._lock:
            self._forget()

    def _exchange(self, job: bytes) -> bytes:
        try:
            connection = self._idle_connection() or self._start()
            connection.send_bytes(job)
            if connection.poll(self._limit_seconds):
                return connection.recv_bytes(RESULT_BYTES)
        except (EOFError, OSError):
            self._forget()
            raise ConstraintTooComplex(
                f"Compiling takes more than {self._limit_bytes >> 20} MiB of memory."
            ) from None
        self._forget()
        raise ConstraintTooComplex(f"Compiling takes more than {self._limit_seconds:g} seconds.")

    def _idle_connection(self) -> Connection | None:
        """The process that waits for a job, if one does; one that has ended meanwhile is forgotten."""
        if self._connection is not None and self._connection.poll(0):
            self._forget()  # it owes no answer, so what there is to read is its end
        return self._connection

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                command_of(sys.executable, __name__, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # More threads would only take memory.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        connection = Connection(ours.detach())
        self._stop = weakref.finalize(self, _end, process, connection)
        connection.send_bytes(pickle.dumps((self._prepare, self._limit_seconds, self._limit_bytes)))
        if not connection.poll(START_SECONDS):
            self._forget()
            raise GallamaError("The process that compiles constraints did not start.")
        connection.recv_bytes()
        self._connection = connection
        return connection

    def _forget(self) -> None:
        self._stop()
        self._connection = None


def main() -> NoReturn:
    serve(int(sys.argv[1]))


def serve(descriptor: int) -> NoReturn:
    """What runs in the helper: jobs in, results out, until the other side is gone."""
    connection = Connection(descriptor)
    prepare, limit_seconds, limit_bytes = pickle.loads(connection.recv_bytes())
    if prepare is not None:
        prepare()
    _limit_memory(limit_bytes)
    connection.send_bytes(b"ready")
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    while True:
        job = jobs.get()
        _limit_processor_time(limit_seconds)
        connection.send_bytes(_result_of(job))


def _receive(connection: Connection, jobs: queue.SimpleQueue[bytes]) -> None:
    """Hold what arrives; end the process, whatever it is doing, as soon as nobody is there to hear of it."""
    while True:
        try:
            jobs.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def _result_of(job: bytes) -> bytes:
    try:
        function, args, kwargs = pickle.loads(job)
        return pickle.dumps(("returned", function(*args, **kwargs)))
    except MemoryError:
        return pickle.dumps(("raised", ConstraintTooComplex("Compiling takes too much memory.")))
    except RecursionError:
        return pickle.dumps(("raised", ConstraintTooComplex("It is nested too deep.")))
    except Exception as error:
        return pickle.dumps(("raised", error))


def _limit_memory(limit_bytes: int) -> None:
    """Let the process have so much more than it has now."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():  # not Linux: only the time is limited
        return
    import resource  # which Windows does not have

    used_bytes = int(statistics.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + limit_bytes, used_bytes + limit_bytes))


def _limit_processor_time(seconds: float) -> None:
    """For a job that never lets the other thread notice that nobody waits any more."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds + 1), most))


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def _nothing_to_stop() -> None:
    pass
