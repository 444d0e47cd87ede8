"""`gallama setup`, with a Python that only notes what it is to do."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gallama.catalog.environments import extensions_folder, read_record, requirements_of
from gallama.cli import main
from gallama.cli.setup import explain_pip

# Makes an environment of itself. Files of the folder that it is told of say what goes wrong.
PYTHON = """\
#!/bin/sh
case "$*" in
    "-c import sys"*) cat {folder}/version ;;
    "-m venv "*)
        if [ -f {folder}/no-venv ]; then echo "No module named venv"; exit 1; fi
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip install"*)
        echo "$* PYTHONPATH=$PYTHONPATH" >> {folder}/installed
        echo "Collecting torch"
        if [ -f {folder}/ctrl-c ]; then kill -INT $PPID; exec sleep 60; fi
        if [ -f {folder}/no-pip ]; then echo "ERROR: torch is sold out." >&2; exit 1; fi ;;
    *gallama.engines.cuda_extension*)
        echo "$*" >> {folder}/compiled
        [ ! -f {folder}/no-gpu ] || {{ echo "That cannot be done here: there is no GPU." >&2; exit 3; }}
        [ ! -f {folder}/no-compiler ] || {{ echo "ERROR: nvcc is too old." >&2; exit 1; }} ;;
    "-P -c import"*)
        echo "$*" >> {folder}/imported
        if [ -f {folder}/broken ]; then echo "ImportError: libgomp is missing" >&2; exit 1; fi ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


@dataclass(frozen=True)
class Machine:
    """Gallama's home, and a Python beside it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "python"

    @property
    def environments(self) -> Path:
        return self.folder / "home" / "environments"

    @property
    def embedding(self) -> Path:
        return self.environments / "embedding"

    def setup(self, *flags: str, python: str | None = None, name: str = "embedding") -> int:
        return main(["setup", name, "--python", python or str(self.python), *flags])

    def let(self, happen: str) -> None:
        (self.folder / happen).touch()

    def become(self, version: str) -> None:
        (self.folder / "version").write_text(version)

    def installed(self) -> list[str]:
        """A line for each call of pip."""
        return self._lines("installed")

    def compiled(self) -> list[str]:
        """A line for each time that an extension was to be compiled."""
        return self._lines("compiled")

    def imported(self) -> list[str]:
        """A line for each time that modules were to be imported."""
        return self._lines("imported")

    def _lines(self, log: str) -> list[str]:
        path = self.folder / log
        return path.read_text().splitlines() if path.exists() else []

    def builds(self) -> list[str]:
        """What is in the folder of environments, locks aside."""
        return sorted(entry.name for entry in self.environments.iterdir() if entry.suffix != ".lock")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    machine.python.write_text(PYTHON.format(folder=tmp_path))
    machine.python.chmod(0o755)
    machine.become("3.12.1")
    monkeypatch.setenv("GALLAMA_HOME", str(tmp_path / "home"))
    return machine


class TestBuilding:
    def test_installs_all_requirements_at_once_and_notes_them(self, machine: Machine) -> None:
        assert machine.setup() == 0
        (line,) = machine.installed()
        assert all(requirement in line for requirement in requirements_of("embedding"))
        record = read_record(machine.embedding)
        assert record is not None
        assert (record.requirements, record.python_version) == (requirements_of("embedding"), "3.12.1")

    def test_shows_what_pip_says_and_tells_time_and_size(
        self, machine: Machine, capfd: pytest.CaptureFixture[str]
    ) -> None:
        machine.setup()
        output = capfd.readouterr().out
        assert "Building" in output
        assert "\nCollecting torch\n" in output
        assert "Done in 0 s" in output
        assert "0.0 GB" in output

    def test_tells_the_new_python_nothing_of_where_the_modules_of_this_one_are(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", "/somewhere")
        machine.setup()
        assert machine.installed()[0].endswith(" PYTHONPATH=")

    def test_is_done_once(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        machine.setup()
        before = machine.builds()
        assert machine.setup() == 0
        assert "--recreate builds it anew" in capsys.readouterr().out
        assert (len(machine.installed()), machine.builds()) == (1, before)

    def test_is_done_again_when_asked_for_and_leaves_nothing_of_the_former(self, machine: Machine) -> None:
        machine.setup()
        former = machine.embedding.resolve()
        assert machine.setup("--recreate") == 0
        assert not former.exists()
        assert machine.builds() == [machine.embedding.resolve().name, "embedding"]

    def test_is_done_again_when_the_requirements_have_changed(self, machine: Machine) -> None:
        machine.setup()
        note = machine.embedding / "gallama.json"
        note.write_text(json.dumps(json.loads(note.read_text()) | {"requirements": ["torch>=1"]}))
        machine.setup()
        assert len(machine.installed()) == 2

    def test_is_done_again_for_another_python_that_is_named(self, machine: Machine) -> None:
        machine.setup()
        machine.become("3.11.9")
        machine.setup()
        assert len(machine.installed()) == 2

    def test_takes_the_place_of_a_folder_that_it_has_not_made(self, machine: Machine) -> None:
        (machine.embedding / "bin").mkdir(parents=True)
        assert machine.setup() == 0
        assert machine.builds() == [machine.embedding.resolve().name, "embedding"]

    def test_clears_away_what_a_killed_one_has_left(self, machine: Machine) -> None:
        (machine.environments / ".embedding-0123abcd" / "bin").mkdir(parents=True)
        (machine.environments / ".embedding-0123abcd.link").symlink_to(".embedding-0123abcd")
        machine.setup()
        assert machine.builds() == [machine.embedding.resolve().name, "embedding"]


class TestCompiling:
    def test_is_done_in_the_environment_that_is_built(self, machine: Machine) -> None:
        assert machine.setup(name="exllamav3") == 0
        (line,) = machine.compiled()
        assert line.endswith("gallama.engines.cuda_extension exllamav3")
        assert extensions_folder(machine.environments / "exllamav3").is_dir()

    def test_is_not_done_by_the_check_that_modules_can_be_imported(self, machine: Machine) -> None:
        machine.setup(name="exllamav2")
        assert machine.imported() == ["-P -c import torch, safetensors, tokenizers"]

    def test_is_not_done_for_engines_that_have_nothing_to_compile(self, machine: Machine) -> None:
        machine.setup()
        assert machine.compiled() == []
        assert not extensions_folder(machine.embedding).exists()

    def test_waits_for_the_first_load_where_it_cannot_be_done(
        self, machine: Machine, capfd: pytest.CaptureFixture[str]
    ) -> None:
        machine.let("no-gpu")
        assert machine.setup(name="exllamav3") == 0
        output = capfd.readouterr()
        assert "there is no GPU" in output.err
        assert "It will be compiled when a model is first loaded" in output.out
        assert extensions_folder(machine.environments / "exllamav3").is_dir()

    def test_that_fails_leaves_nothing(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        machine.let("no-compiler")
        assert machine.setup(name="exllamav3") == 2
        assert "exllamav3 cannot be compiled: nvcc is too old." in capsys.readouterr().err
        assert machine.builds() == []


class TestAdditions:
    def test_are_installed_after_the_requirements_and_built_with_them_at_hand(self, machine: Machine) -> None:
        machine.setup("--with", "flash-attn", "--with", "b==1", name="exllamav2")
        first, second, third = machine.installed()
        assert "flash-attn" not in first
        assert "--no-build-isolation" in second
        assert (second.split()[-2], third.split()[-2]) == ("flash-attn", "b==1")
        assert all(requirement in second for requirement in requirements_of("exllamav2"))

    def test_stay_when_it_is_built_anew(self, machine: Machine) -> None:
        machine.setup("--with", "flash-attn", name="exllamav2")
        machine.setup("--recreate", name="exllamav2")
        assert ["flash-attn" in line for line in machine.installed()] == [False, True, False, True]

    def test_that_are_new_have_it_built_anew(self, machine: Machine) -> None:
        machine.setup()
        machine.setup("--with", "a")
        machine.setup("--with", "a")
        assert len(machine.installed()) == 1 + 2
        record = read_record(machine.embedding)
        assert record is not None
        assert record.additions == ("a",)

    def test_that_are_files_are_found_again_from_elsewhere(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(machine.folder)
        machine.let("a.whl")
        machine.setup("--with", "a.whl")
        record = read_record(machine.embedding)
        assert record is not None
        assert record.additions == (str(machine.folder / "a.whl"),)

    @pytest.mark.parametrize("package", ["", " ", "--pre", "-r list.txt"])
    def test_that_are_options_of_pip_are_refused(
        self, machine: Machine, capsys: pytest.CaptureFixture[str], package: str
    ) -> None:
        assert machine.setup(f"--with={package}") == 2
        assert "is no package" in capsys.readouterr().err
        assert machine.installed() == []

    def test_that_would_be_good_to_have_are_named(
        self, machine: Machine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine.setup(name="exllamav2")
        assert "To have it: gallama setup exllamav2 --with flash-attn\n" in capsys.readouterr().out
        machine.setup()
        assert "To have it" not in capsys.readouterr().out


class TestFailing:
    @pytest.mark.parametrize(
        ("happening", "message"),
        [
            ("no-venv", "No module named venv. Debian has it in a package of its own, python3-venv."),
            ("no-pip", "pip could not install it: torch is sold out."),
            ("broken", "What was installed cannot be imported: ImportError: libgomp is missing."),
        ],
    )
    def test_says_why_and_leaves_nothing(
        self, machine: Machine, capsys: pytest.CaptureFixture[str], happening: str, message: str
    ) -> None:
        machine.let(happening)
        assert machine.setup() == 2
        assert message in capsys.readouterr().err
        assert machine.builds() == []

    def test_keeps_the_environment_that_was_there(self, machine: Machine) -> None:
        machine.setup()
        before = machine.builds()
        machine.let("no-pip")
        assert machine.setup("--recreate") == 2
        assert machine.builds() == before
        assert read_record(machine.embedding) is not None

    def test_by_ctrl_c_leaves_nothing_and_says_so(self, machine: Machine) -> None:
        machine.let("ctrl-c")
        command = [sys.executable, "-m", "gallama", "setup", "embedding", "--python", str(machine.python)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 130
        assert "Broken off; nothing has changed." in done.stdout
        assert "Traceback" not in done.stderr
        assert machine.builds() == []

    def test_while_another_is_at_work(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        machine.environments.mkdir(parents=True)
        with (machine.environments / ".embedding.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert machine.setup() == 2
        assert "Another `gallama setup embedding` is at work." in capsys.readouterr().err

    def test_where_nothing_can_be_written(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        (machine.folder / "home").write_text("a file")
        assert machine.setup() == 2
        assert "cannot be built" in capsys.readouterr().err


class TestPython:
    @pytest.mark.parametrize("version", ["3.10.14", "3.13.0", "2.7.18"])
    def test_that_does_not_fit_is_refused(
        self, machine: Machine, capsys: pytest.CaptureFixture[str], version: str
    ) -> None:
        machine.become(version)
        assert machine.setup() == 2
        error = capsys.readouterr().err
        assert f"is Python {version}; embedding needs a Python from 3.11 to 3.12" in error

    @pytest.mark.parametrize("python", ["/nowhere/python", "true"])
    def test_that_is_none_is_refused(
        self, machine: Machine, capsys: pytest.CaptureFixture[str], python: str
    ) -> None:
        assert machine.setup(python=python) == 2
        assert f"{python!r} is no Python that runs" in capsys.readouterr().err

    def test_is_found_by_its_name_where_this_one_does_not_fit(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        newer = machine.folder / "newer"
        newer.write_text("#!/bin/sh\necho 3.15.0\n")
        newer.chmod(0o755)
        programs = machine.folder / "programs"
        programs.mkdir()
        shutil.copy(machine.python, programs / "python3.12")
        monkeypatch.setattr(sys, "executable", str(newer))
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        assert main(["setup", "embedding"]) == 0
        record = read_record(machine.embedding)
        assert record is not None
        assert record.python_version == "3.12.1"


class TestWhatPipSays:
    def test_of_a_full_disk_names_the_free_space_and_other_places(self, tmp_path: Path) -> None:
        line = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
        assert "GB are free" in explain_pip([line], tmp_path)
        assert "GALLAMA_HOME" in explain_pip([line], tmp_path)

    def test_of_an_index_that_does_not_answer_names_what_leads_to_another(self, tmp_path: Path) -> None:
        lines = [
            "WARNING: Retrying (Retry(total=4, connect=None)) after connection broken",
            "ERROR: Could not find a version that satisfies the requirement torch (from versions: none)",
            "ERROR: No matching distribution found for torch",
        ]
        assert "The package index cannot be reached" in explain_pip(lines, tmp_path)

    def test_of_anything_else_is_its_first_error(self, tmp_path: Path) -> None:
        lines = ["WARNING: mind the step", "ERROR: Cannot install a and b.", "ERROR: ResolutionImpossible"]
        assert explain_pip(lines, tmp_path) == "pip could not install it: Cannot install a and b."
