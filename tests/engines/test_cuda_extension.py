"""Libraries that compile their CUDA extension when they are imported: for which GPUs, and one at a time."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gallama.bootstrap import command_of
from gallama.catalog.environments import CANNOT_COMPILE_HERE
from gallama.engines.cuda_extension import architectures, clear_lock, import_with_extension, is_compiling
from gallama.errors import InvalidConfig, MissingExtra

SUPPORTED = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100a", "sm_120"]


@pytest.mark.parametrize(
    ("capabilities", "supported", "wanted"),
    [
        ([(9, 0)], SUPPORTED, "9.0+PTX"),
        ([(8, 9), (8, 6), (8, 6)], SUPPORTED, "8.6;8.9+PTX"),
        ([(10, 0), (8, 6)], SUPPORTED, "8.6;10.0+PTX"),  # in the order of numbers, not of letters
        ([(13, 0)], SUPPORTED, "12.0+PTX"),  # newer than the compiler knows: runs what is made for the newest
        ([(6, 1), (9, 0)], SUPPORTED, "9.0+PTX"),  # nothing can be compiled for the older one
        ([(6, 1)], SUPPORTED, ""),
        ([], SUPPORTED, ""),
        ([(9, 0)], [], ""),
        ([(9, 0)], ["gfx1100", "compute_90"], ""),
    ],
)
def test_compiles_for_all_gpus_of_the_machine_that_it_can(
    capabilities: list[tuple[int, int]], supported: list[str], wanted: str
) -> None:
    assert architectures(capabilities, supported) == wanted


Compile = Callable[[Path, float], "subprocess.Popen[bytes]"]


@pytest.fixture
def compile_in(tmp_path: Path) -> Iterator[Compile]:
    """Starts a program that is called as the compiler that torch runs, and does nothing for some seconds."""
    program = tmp_path / "ninja"
    program.symlink_to("/bin/sleep")
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([program, str(seconds)], cwd=folder))
        while not _is_called_ninja(started[-1]):
            time.sleep(0.01)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def _is_called_ninja(process: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{process.pid}/comm").read_text().strip() == "ninja"


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/comm").exists(), reason="asks Linux for a program's name"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an extension is compiled, with the lock that a process has left which was killed."""
    path = tmp_path / "exllamav3_ext"
    path.mkdir()
    (path / "lock").touch()
    return path


def test_a_lock_that_was_left_behind_is_taken_away(folder: Path) -> None:
    clear_lock(folder / "lock")
    assert not (folder / "lock").exists()
    clear_lock(folder / "lock")


@needs_proc
def test_a_lock_stays_while_a_compiler_runs_where_it_is(
    folder: Path, tmp_path: Path, compile_in: Compile
) -> None:
    compiler = compile_in(folder, 600)
    assert is_compiling(folder)
    assert not is_compiling(tmp_path)
    waiting = threading.Thread(target=clear_lock, args=(folder / "lock",))
    waiting.start()
    assert (folder / "lock").exists()
    compiler.kill()
    compiler.wait()
    waiting.join(timeout=30)
    assert not (folder / "lock").exists()


def test_where_there_is_no_gpu_nothing_is_compiled() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InvalidConfig, match=r"some_library computes on NVIDIA GPUs only, and PyTorch .* "):
        import_with_extension("some_library")


@pytest.mark.parametrize(
    ("cuda", "told"),
    [
        ("13.0", "sees none here. `gpus` or CUDA_VISIBLE_DEVICES may hide them"),
        (None, "was built without CUDA. `gallama setup some_library --recreate` installs another one"),
    ],
)
def test_a_gpu_that_is_not_seen_is_told_from_a_torch_that_sees_none(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(InvalidConfig, match=re.escape(told)):
        import_with_extension("some_library")


class TestWithAGpu:
    """As far as PyTorch says; the libraries are some of our own, which need none."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
        monkeypatch.setenv("PATH", "/usr/bin")
        monkeypatch.setenv("MAX_JOBS", "1")

    def write(self, folder: Path, name: str, code: str) -> str:
        (folder / f"{name}.py").write_text(code)
        return name

    def test_a_library_finds_its_compiler_and_no_lock(self, tmp_path: Path) -> None:
        (tmp_path / "ninja").mkdir()
        (tmp_path / "ninja" / "__init__.py").touch()
        lock = tmp_path / "extensions" / "finding_ext" / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        import_with_extension(self.write(tmp_path, "finding", "import os\npath = os.environ['PATH']\n"))
        assert sys.modules["finding"].path.split(":") == [
            f"{sys.prefix}/bin",
            f"{tmp_path}/bin",
            "/usr/bin",
        ]
        assert not lock.exists()

    def test_why_it_cannot_be_compiled_is_told_in_a_line(self, tmp_path: Path) -> None:
        name = self.write(
            tmp_path, "failing", "raise RuntimeError('Error building extension\\n' + 'x' * 10**6)"
        )
        with pytest.raises(MissingExtra) as raised:
            import_with_extension(name)
        assert "of failing cannot be compiled or loaded (RuntimeError: Error building extension)." in str(
            raised.value
        )
        assert len(raised.value.message) < 600

    def test_what_is_not_installed_is_told_apart(self, tmp_path: Path) -> None:
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            import_with_extension(self.write(tmp_path, "lacking", "import no_such_module"))


def test_the_program_that_setup_runs_tells_what_lacks() -> None:
    command = command_of(sys.executable, "gallama.engines.cuda_extension", "exllamav3")
    done = subprocess.run(
        command, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (CANNOT_COMPILE_HERE, "")
    lacking = "GPU that PyTorch sees" if torch.version.cuda else f"CUDA in PyTorch {torch.__version__}"
    assert done.stderr.startswith(f"That cannot be done here: there is no {lacking}")


def test_what_is_imported_already_is_not_compiled() -> None:
    import_with_extension("pytest")
