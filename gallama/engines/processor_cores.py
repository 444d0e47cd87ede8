"""How many processor cores a worker computes on: those it may use, shared with the busy workers beside it.

llama.cpp's threads wait for each other many times per token, spinning. Two workers that both take all cores
are slower than one by far more than half, so each takes its part for as long as another one is busy:

    busy workers of a user, on 8 cores    1    2       3
    threads of each                       8    4, 4    3, 3, 2

A busy worker locks one byte of a file that all workers of the user have, at a place of its own, and counts
the others' locks before each step. The kernel gives up the locks of a process that ends, however it ends.
There is one file for each set of cores, so workers that are pinned apart do not share. Where there are no
such locks (everywhere but on Linux) workers do not share: set `n_threads` for those that run side by side.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import secrets
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

_UNLIMITED = math.inf
_PLACES = 1 << 62
# Linux's `struct flock`: type, whence, start, length, process id; padded as C does.
_LOCK = struct.Struct("hhqqi0q")


class Cores(Protocol):
    """The cores of one worker, as the thread that computes sees them."""

    def begin_work(self) -> None:
        """There is something to compute from here on."""
        ...

    def end_work(self) -> None:
        """There is nothing left to compute; the cores are others' until the next `begin_work`."""
        ...

    def threads(self) -> int:
        """With how many threads to compute the next step. Cheap: microseconds."""
        ...


class OwnCores:
    """A fixed number of cores, whatever other workers do."""

    def __init__(self, count: int) -> None:
        self._count = count

    def begin_work(self) -> None:
        pass

    def end_work(self) -> None:
        pass

    def threads(self) -> int:
        return self._count


class SharedCores:
    """Cores that are divided evenly among the workers that are busy on them."""

    def __init__(self, count: int, folder: Path | None = None) -> None:
        """
        Args:
            count: cores of all workers together.
            folder: where the workers' file is; one of this user's own if not given.
        """
        self._count = count
        self._folder = folder
        self._place = secrets.randbelow(_PLACES)
        self._file: int | None = None
        self._is_alone = False
        """Whether locks have failed, so that nobody is counted any more."""

    def begin_work(self) -> None:
        if self._file is not None or self._is_alone:
            return
        try:
            # Opened each time: whoever tidies up temporary files may have removed it.
            self._file = _open_file(self._folder or _users_folder())
            _set_lock(self._file, self._place)
        except OSError as error:
            self._share_no_more(error)

    def end_work(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def threads(self) -> int:
        if self._file is None:
            return self._count
        try:
            others = list(_locked_places(self._file, 0, _PLACES))
        except OSError as error:
            self._share_no_more(error)
            return self._count
        return share(self._count, before=sum(place < self._place for place in others), others=len(others))

    def _share_no_more(self, error: OSError) -> None:
        self._is_alone = True
        self.end_work()
        logger.warning(
            "This worker cannot see whether others are busy and takes all %d cores (%s). Where several run"
            " side by side, set `n_threads` in their `backend_extra_args`.",
            self._count,
            error,
        )


def cores_to_share() -> Cores:
    """All cores that this process may use, shared with other workers where the system has locks for it."""
    if sys.platform == "linux":
        return SharedCores(usable_cores())
    return OwnCores(usable_cores())


def share(cores: int, *, before: int, others: int) -> int:
    """One worker's part of the cores, at least 1. Those that do not divide evenly are for the first ones.

    Args:
        before: how many of the others come before this one.
    """
    each, rest = divmod(cores, others + 1)
    return max(1, each + (before < rest))


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, at least 1: its affinity, and its control groups' quota rounded down.

    Args:
        root: where /proc and the control groups' files are.
    """
    return max(1, int(min(len(_affinity()), _quota_cores(root))))


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quota_cores(root: Path) -> float:
    """The smallest quota of the process's control groups and of those around them."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        return _UNLIMITED
    folders = [folder for mount in mounts for folder in _group_folders(mount, groups, root)]
    return min(map(_quota, folders), default=_UNLIMITED)


def _group_folders(mount: str, groups: list[str], root: Path) -> Iterator[Path]:
    """The folders, in one mounted hierarchy, of the process's control group and of those around it.

    Args:
        mount: a line of /proc/self/mountinfo: "33 31 0:29 /mounted /point rw - cgroup cgroup rw,cpu".
        groups: lines of /proc/self/cgroup: "1:cpu,cpuacct:/group", and "0::/group" for version 2.
    """
    place, _, kind = mount.partition(" - ")
    file_system, _, options = kind.partition(" ")
    if file_system == "cgroup2":
        group = next((line[3:] for line in groups if line.startswith("0::")), None)
    elif file_system == "cgroup" and "cpu" in options.split()[-1].split(","):
        of_cpu = (line.split(":", 2) for line in groups)
        group = next((path for _, controllers, path in of_cpu if "cpu" in controllers.split(",")), None)
    else:
        return
    if group is None:
        return
    mounted, point = (_unescape(field) for field in place.split()[3:5])
    top = root / point.lstrip("/")
    yield top
    # A group outside of what is mounted here, as some containers have it, cannot be looked at.
    if (group + "/").startswith(mounted.rstrip("/") + "/"):
        inside = Path(os.path.relpath(group, mounted))
        yield from (top / part for part in (inside, *inside.parents) if part != Path("."))


def _unescape(field: str) -> str:
    """A path of mountinfo, where blanks and the like are octal numbers."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)


def _quota(folder: Path) -> float:
    """The cores that a control group may keep busy."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        # "max" in version 2, -1 in version 1.
        return _UNLIMITED if quota == "max" or int(quota) < 0 else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return _UNLIMITED


def _users_folder() -> Path:
    """A folder that only this user can enter.

    Raises:
        OSError: it cannot be made, or is not this user's alone.
    """
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")
    temporary = Path(tempfile.gettempdir())
    folder = runtime / "gallama" if runtime.is_dir() else temporary / f"gallama-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    return folder


def _open_file(folder: Path) -> int:
    cores = hashlib.sha256(repr(_affinity()).encode()).hexdigest()[:16]
    return os.open(folder / f"busy-{cores}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _set_lock(file: int, place: int) -> None:
    """Lock one byte for as long as the file stays open."""
    import fcntl  # which Windows does not have

    # Of an open file, not of the process: a process may have two workers, and see the other's lock.
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))


def _locked_places(file: int, start: int, end: int) -> Iterator[int]:
    """The bytes from `start` on and before `end` that others have locked."""
    import fcntl

    if start == end:
        return
    asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
    kind, _, place, _, _ = _LOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return
    # The kernel names any of them.
    yield place
    yield from _locked_places(file, start, place)
    yield from _locked_places(file, place + 1, end)
