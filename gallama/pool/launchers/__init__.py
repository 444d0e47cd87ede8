"""Where workers run: one file for each kind of place."""

from __future__ import annotations

from typing import Protocol

from gallama.catalog import ResolvedModel
from gallama.wire import Ready


class RunningWorker(Protocol):
    """One process that loads a model and then serves it, until it ends or is stopped."""

    @property
    def secret(self) -> str:
        """What its connections must begin with."""
        ...

    async def ready(self) -> Ready:
        """Return once it answers connections.

        Raises:
            GallamaError: it could not load its model; the worker's own reason.
        """
        ...

    async def exited(self) -> str:
        """Return once it has ended; says how, as in "was killed by SIGKILL"."""
        ...

    async def stop(self) -> None:
        """End it, if it has not ended, and give back what it used."""
        ...


class Launcher(Protocol):
    async def launch(self, model: ResolvedModel) -> RunningWorker:
        """Start a worker that loads the model.

        Raises:
            ModelLoadFailed: no process could be started.
        """
        ...
