"""Where workers run: one file for each kind of place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from gallama.catalog import ResolvedModel
from gallama.wire import Ready

if TYPE_CHECKING:
    from gallama.pool.gpus import Placement


class RunningWorker(Protocol):
    """One process that loads a model and then serves it, until it ends or is stopped."""

    @property
    def secret(self) -> str:
        """What its connections must begin with."""
        ...

    @property
    def process_id(self) -> int | None:
        """Of its process, if that is one of this machine."""
        ...

    def memory_bytes(self) -> int:
        """The resident memory of its process and of that one's children; 0 where it cannot be told."""
        ...

    async def ready(self, on_progress: Callable[[float], None]) -> Ready:
        """Return once it answers connections.

        Args:
            on_progress: told every now and then, while it loads, which part of the model is loaded, 0 to 1.

        Raises:
            GallamaError: it could not load its model; the worker's own reason.
        """
        ...

    async def exited(self) -> str:
        """Return once it has ended; says how, as in "was killed by SIGKILL"."""
        ...

    async def stop(self) -> None:
        """End it, if it has not ended, with the processes that it has started, and give back what it used.

        Cancelled, it still does so, only without patience.
        """
        ...


class Launcher(Protocol):
    async def launch(self, model: ResolvedModel, placement: Placement | None = None) -> RunningWorker:
        """Start a worker that loads the model.

        Args:
            placement: the GPUs that it may use; None: its engine chooses.

        Raises:
            ModelLoadFailed: no process could be started.
        """
        ...
