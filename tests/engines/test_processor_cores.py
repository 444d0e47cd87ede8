"""Which cores there are, and how busy workers share them; the workers are real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gallama.config import ModelSpec
from gallama.engines.llama_cpp.options import choose_cores, read_options
from gallama.engines.processor_cores import OwnCores, SharedCores, share, usable_cores

needs_locks = pytest.mark.skipif(sys.platform != "linux", reason="workers share cores on Linux only")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Does what it is told on standard input, and answers with its threads.
WORKER = """
import sys
from pathlib import Path
from gallama.engines.processor_cores import SharedCores

cores = SharedCores(int(sys.argv[1]), Path(sys.argv[2]))
for line in sys.stdin:
    {"begin": cores.begin_work, "end": cores.end_work, "ask": int}[line.strip()]()
    print(cores.threads(), flush=True)
"""


class Worker:
    """A process that computes with a share of 8 cores."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, "8", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, word: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


NewWorker = Callable[[], Worker]


@pytest.fixture
def new_worker(tmp_path: Path) -> Iterator[NewWorker]:
    workers = []

    def start() -> Worker:
        workers.append(Worker(tmp_path))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()


def threads_of(workers: list[Worker]) -> list[int]:
    return sorted(worker.tell("ask") for worker in workers)


@needs_locks
def test_one_busy_worker_among_idle_ones_has_all_cores(new_worker: NewWorker) -> None:
    busy, idle = new_worker(), new_worker()
    idle.tell("begin")
    idle.tell("end")
    assert busy.tell("begin") == 8


@needs_locks
def test_busy_workers_never_have_more_threads_than_cores_and_leave_none_unused(
    new_worker: NewWorker,
) -> None:
    workers = [new_worker() for _ in range(3)]
    shares = []
    for count in (1, 2, 3):
        workers[count - 1].tell("begin")
        shares.append(threads_of(workers[:count]))
    assert shares == [[8], [4, 4], [2, 3, 3]]


@needs_locks
def test_who_ends_its_work_leaves_its_cores_to_the_others(new_worker: NewWorker) -> None:
    one, other = new_worker(), new_worker()
    one.tell("begin")
    assert other.tell("begin") == 4
    one.tell("end")
    assert other.tell("ask") == 8


@needs_locks
def test_the_cores_of_a_killed_worker_are_free(new_worker: NewWorker) -> None:
    one, other = new_worker(), new_worker()
    one.tell("begin")
    assert other.tell("begin") == 4
    one.process.send_signal(signal.SIGKILL)
    one.process.wait()
    assert other.tell("ask") == 8


@needs_locks
def test_a_worker_that_is_stopped_keeps_its_share_and_holds_nobody_up(new_worker: NewWorker) -> None:
    one, other = new_worker(), new_worker()
    one.tell("begin")
    one.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert [other.tell(word) for word in ("begin", "ask", "end", "begin")] == [4, 4, 8, 4]
    assert time.monotonic() - began < 5
    one.process.send_signal(signal.SIGCONT)
    assert one.tell("ask") == 4


@needs_locks
def test_two_workers_of_one_process_share_as_well(tmp_path: Path) -> None:
    one, other = SharedCores(8, tmp_path), SharedCores(8, tmp_path)
    one.begin_work()
    other.begin_work()
    assert (one.threads(), other.threads()) == (4, 4)
    one.end_work()
    assert other.threads() == 8
    other.end_work()


@needs_locks
def test_work_that_begins_twice_ends_once(tmp_path: Path) -> None:
    one, other = SharedCores(8, tmp_path), SharedCores(8, tmp_path)
    one.begin_work()
    one.begin_work()
    one.end_work()
    other.begin_work()
    assert other.threads() == 8
    other.end_work()


@needs_locks
def test_a_file_that_was_tidied_away_is_made_again(tmp_path: Path) -> None:
    one, other = SharedCores(8, tmp_path), SharedCores(8, tmp_path)
    one.begin_work()
    one.end_work()
    for file in tmp_path.iterdir():
        file.unlink()
    one.begin_work()
    other.begin_work()
    assert (one.threads(), other.threads()) == (4, 4)
    one.end_work()
    other.end_work()


@needs_locks
def test_workers_that_are_pinned_apart_do_not_share(tmp_path: Path) -> None:
    if CORES < 2:
        pytest.skip("needs two cores")
    pinned = os.sched_getaffinity(0)
    one, other = SharedCores(1, tmp_path), SharedCores(1, tmp_path)
    try:
        first, second = sorted(pinned)[:2]
        os.sched_setaffinity(0, {first})
        one.begin_work()
        os.sched_setaffinity(0, {second})
        other.begin_work()
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        os.sched_setaffinity(0, pinned)
        one.end_work()
        other.end_work()


@needs_locks
def test_a_folder_that_others_can_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "gallama").mkdir()
    (tmp_path / "gallama").chmod(0o777)
    cores = SharedCores(8)
    cores.begin_work()
    assert cores.threads() == 8
    assert "n_threads" in caplog.text
    assert not list((tmp_path / "gallama").iterdir())


@needs_locks
def test_a_link_to_another_folder_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "gallama").symlink_to(tmp_path / "elsewhere")
    cores = SharedCores(8)
    cores.begin_work()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert "n_threads" in caplog.text


@needs_locks
def test_without_a_runtime_folder_the_users_own_temporary_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cores = SharedCores(8)
    cores.begin_work()
    cores.end_work()
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_shares_add_up_to_all_cores_wherever_there_are_enough() -> None:
    for cores in range(1, 40):
        for workers in range(1, 40):
            shares = [share(cores, before=before, others=workers - 1) for before in range(workers)]
            assert sum(shares) == max(cores, workers)
            assert max(shares) - min(shares) <= 1


V2 = "34 25 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
Files = dict[str, str]


@pytest.fixture
def cores_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The usable ones of 16 cores on a machine with these control groups."""

    def count(*, group: str, mounts: str, files: Files) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
        everything = {"proc/self/cgroup": group, "proc/self/mountinfo": mounts, **files}
        for name, content in everything.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return usable_cores(tmp_path)

    return count


def v2(quota: str, folder: str = "") -> Files:
    return {f"sys/fs/cgroup{folder}/cpu.max": quota + "\n"}


def v1(quota: int, folder: str = "", mount: str = "cpu,cpuacct") -> Files:
    place = f"sys/fs/cgroup/{mount}{folder}"
    return {f"{place}/cpu.cfs_quota_us": f"{quota}\n", f"{place}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("group", "mounts", "files", "cores"),
    [
        ("0::/\n", V2, v2("max 100000"), 16),
        ("0::/\n", V2, v2("400000 100000"), 4),
        ("0::/\n", V2, v2("399999 100000"), 3),
        ("0::/\n", V2, v2("50000 100000"), 1),
        ("0::/\n", V2, v2("6400000 100000"), 16),
        ("0::/\n", V2, v2("nonsense"), 16),
        ("0::/\n", V2, {}, 16),
        ("0::/a.slice/b\n", V2, v2("max 100000", "/a.slice/b") | v2("300000 100000", "/a.slice"), 3),
        ("0::/a.slice/b\n", V2, v2("200000 100000", "/a.slice/b") | v2("300000 100000", "/a.slice"), 2),
        ("0::/a.slice/b\n", V2, v2("500000 100000"), 5),
        ("0::/../outside\n", V2, v2("700000 100000"), 7),
        ("4:cpu,cpuacct:/docker/x\n0::/\n", V1, v1(250_000, "/docker/x") | v1(-1, "/docker"), 2),
        ("4:cpu,cpuacct:/docker/x\n", V1, v1(-1, "/docker/x") | v1(600_000, "/docker"), 6),
        ("4:cpu,cpuacct:/\n", V1, v1(-1), 16),
        ("4:cpuacct:/x\n3:cpu:/\n", V1.replace("cpu,cpuacct", "cpu"), v1(300_000, mount="cpu"), 3),
        # A container sees its own group as the root of what is mounted, and its path from the outside.
        ("4:cpu,cpuacct:/docker/x\n", V1.replace("0:29 /", "0:29 /docker/x"), v1(300_000), 3),
        (
            "4:cpu,cpuacct:/docker/x/y\n",
            V1.replace("0:29 /", "0:29 /docker/x"),
            v1(-1) | v1(200_000, "/y"),
            2,
        ),
        # Both versions side by side: the quota stands where the controller is.
        (
            "4:cpu,cpuacct:/x\n0::/y\n",
            V1 + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
            v1(200_000, "/x"),
            2,
        ),
        ("0::/\n", V2.replace("/sys/fs/cgroup", "/odd\\040place"), {"odd place/cpu.max": "200000 100000"}, 2),
        ("garbage\n", "garbage\n", v2("200000 100000"), 16),
    ],
)
def test_quotas_of_control_groups_count_wherever_they_are(
    cores_with: Callable[..., int], group: str, mounts: str, files: Files, cores: int
) -> None:
    assert cores_with(group=group, mounts=mounts, files=files) == cores


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == CORES


def chosen(arguments: dict[str, int], **values: object) -> type:
    spec = ModelSpec.model_validate({"model_id": "any", "backend_extra_args": arguments, **values})
    return type(choose_cores(spec, read_options(spec)))


def test_threads_that_the_spec_sets_are_not_shared() -> None:
    spec = ModelSpec.model_validate({"model_id": "any", "backend_extra_args": {"n_threads": 3}})
    cores = choose_cores(spec, read_options(spec))
    cores.begin_work()
    assert (type(cores), cores.threads()) == (OwnCores, 3)
    assert chosen({"n_threads_batch": 3}) == OwnCores


@needs_locks
def test_only_a_model_that_a_gpu_holds_as_a_whole_takes_no_part_in_sharing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen({}) == SharedCores
    monkeypatch.setattr("gallama.engines.llama_cpp.bindings.supports_gpus", lambda: True)
    assert chosen({}) == OwnCores
    assert chosen({"n_gpu_layers": 5}) == SharedCores
    assert chosen({}, gpus=[0]) == SharedCores
