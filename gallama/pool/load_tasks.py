"""What was ordered to be loaded, and what came of it."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from gallama.catalog import ResolvedModel
from gallama.errors import TaskNotFound
from gallama.pool.instance import Instance
from gallama.pool.views import LoadingModel, LoadStatus, LoadTask

MAX_KEPT_TASKS = 200


@dataclass(slots=True)
class _Entry:
    """One instance that a task waits for. `status` is what was last seen; it ends in completed or failed."""

    instance: Instance
    status: LoadStatus = "queued"
    problem: str = ""

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed")


@dataclass(slots=True)
class _Task:
    entries: list[_Entry]
    id: str = field(default_factory=lambda: f"load-{secrets.token_hex(8)}")
    created: float = field(default_factory=time.time)

    @property
    def is_over(self) -> bool:
        return all(entry.is_over for entry in self.entries)


class LoadTasks:
    """The tasks by their ids; the oldest are forgotten when there are many."""

    def __init__(self) -> None:
        self._tasks: dict[str, _Task] = {}

    def begin(self, instances: Sequence[Instance]) -> LoadTask:
        """A task that waits for the instances; what is ready is completed at once."""
        task = _Task([_Entry(instance) for instance in instances])
        self._tasks[task.id] = task
        self._forget_old()
        self.update()
        return _view(task)

    def update(self) -> None:
        """See how far each instance is."""
        for entry in self._open_entries():
            _look_at(entry)

    def give_up(self, instance: Instance, problem: str) -> None:
        """The instance is not to be loaded any more."""
        for entry in self._open_entries():
            if entry.instance is instance:
                entry.status, entry.problem = "failed", problem

    def find(self, task_id: str) -> LoadTask:
        """
        Raises:
            TaskNotFound: there is none, or it was forgotten.
        """
        task = self._tasks.get(task_id)
        if task is None:
            raise TaskNotFound(f"There is no load task {task_id[:80]!r}; GET /loading_status lists them.")
        return _view(task)

    def under_way_for(self, models: Sequence[ResolvedModel]) -> LoadTask | None:
        """The task that is loading all of these models already."""
        wanted = Counter(map(_identity, models))
        for task in self._tasks.values():
            loading = Counter(_identity(each.instance.model) for each in task.entries if not each.is_over)
            if wanted <= loading:
                return _view(task)
        return None

    @property
    def views(self) -> list[LoadTask]:
        return [_view(task) for task in self._tasks.values()]

    def _open_entries(self) -> list[_Entry]:
        return [entry for task in self._tasks.values() for entry in task.entries if not entry.is_over]

    def _forget_old(self) -> None:
        over = [task.id for task in self._tasks.values() if task.is_over]
        for task_id in over[: max(len(self._tasks) - MAX_KEPT_TASKS, 0)]:
            del self._tasks[task_id]


def _look_at(entry: _Entry) -> None:
    supervisor = entry.instance.supervisor
    if supervisor.state == "ready" and not entry.instance.is_draining:
        entry.status = "completed"
    elif supervisor.state == "failed" and supervisor.problem is not None:
        entry.status, entry.problem = "failed", supervisor.problem.message
    elif entry.instance.has_process:
        entry.status = "loading"


def _view(task: _Task) -> LoadTask:
    return LoadTask(
        id=task.id,
        created=task.created,
        models=tuple(
            LoadingModel(
                name=entry.instance.model.name,
                instance=entry.instance.number,
                status=entry.status,
                progress=1.0 if entry.status == "completed" else entry.instance.supervisor.progress,
                problem=entry.problem,
            )
            for entry in task.entries
        ),
    )


def _identity(model: ResolvedModel) -> Hashable:
    return model.name, model.path, model.spec.model_dump_json()
