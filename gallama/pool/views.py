"""What can be told about models and instances without asking a worker: copies, true for the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gallama.wire import WorkerStatus

InstanceState = Literal[
    "unloaded", "queued", "starting", "ready", "restarting", "draining", "stopping", "failed"
]
"""queued: waits for room beside other models; draining: ends its answers and takes no more; stopping: its
process is being ended."""
LoadStatus = Literal["queued", "loading", "completed", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedInstance:
    """One process that holds a model, or will."""

    number: int
    """Which it is among all instances of this gateway, from 1; never given twice."""
    port: int
    """What old scripts know it by: the gateway's port and its number added. Nothing listens there."""
    state: InstanceState
    progress: float
    """The part of the model that is loaded, 0 to 1."""
    busy: int
    served: int
    capacity: int
    """Requests that it answers at the same time."""
    context_length: int
    """0 while it is not loaded."""
    ready_since: float | None
    """Seconds since 1970."""
    starts: int
    """How often its process was started."""
    process_id: int | None
    memory_bytes: int
    """Resident memory of its process; 0 while there is none."""
    gpus: tuple[int, ...]
    """The indexes of the GPUs that it may use."""
    problem: str
    """Why it is not ready; "" when nothing went wrong."""
    status: WorkerStatus | None
    """What the worker last said of itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One name, and the instances behind it."""

    name: str
    aliases: tuple[str, ...]
    model_type: str
    backend: str
    path: str
    created: int
    """Seconds since 1970 at which the gateway took it up."""
    fingerprint: str
    """Changes when answers to the same request may change."""
    is_pinned: bool
    ttl_seconds: float | None
    last_used: float | None
    """Seconds since 1970; None: never."""
    instances: tuple[ServedInstance, ...]
    waiting: int
    waiting_tokens: int
    """Estimated prompt tokens of those that wait."""
    loads: int = 0
    """How often an instance has become ready, those included that are gone; so for the next two."""
    load_failures: int = 0
    restarts: int = 0
    """How often a worker died or hung, and was started again."""

    @property
    def states(self) -> tuple[InstanceState, ...]:
        return tuple(instance.state for instance in self.instances)

    @property
    def problem(self) -> str:
        """Why it is not ready; "" when nothing went wrong."""
        return next((instance.problem for instance in self.instances if instance.problem), "")

    @property
    def busy(self) -> int:
        return sum(instance.busy for instance in self.instances)

    @property
    def is_loaded(self) -> bool:
        """Whether a process of it runs, or is about to."""
        return any(state not in ("unloaded", "queued", "failed") for state in self.states)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingModel:
    """One instance that a load task waits for."""

    name: str
    instance: int
    status: LoadStatus
    progress: float
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTask:
    """What one call to load models comes to."""

    id: str
    created: float
    """Seconds since 1970."""
    models: tuple[LoadingModel, ...]

    @property
    def status(self) -> LoadStatus:
        """failed as soon as one model has failed; completed when all are loaded."""
        statuses = {model.status for model in self.models}
        for status in ("failed", "loading", "queued"):
            if status in statuses:
                return "loading" if status == "queued" and "completed" in statuses else status
        return "completed"

    @property
    def progress(self) -> float:
        return sum(model.progress for model in self.models) / len(self.models)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """What ending one instance gave back."""

    name: str
    instance: int
    memory_bytes: int
    """Resident memory that its process had."""
    gpu_bytes: int
    """By how much the memory in use on its GPUs has shrunk."""
    is_verified: bool
    """Whether its process is gone, and its GPUs have the memory back as far as they can be asked."""
    cut_requests: int
    """Running answers that did not end within the drain time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that went wrong with an instance."""

    at: float
    """Seconds since 1970."""
    model: str
    instance: int
    code: str
    message: str
