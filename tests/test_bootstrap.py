"""Processes that run a module of this gallama, in interpreters that may have none or another one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gallama import bootstrap

REPORT = """
import importlib.util, sys
import gallama

def main():
    print(gallama.__file__)
    print(sys.argv[1:])
    print([name for name in ("neighbour", "report") if importlib.util.find_spec(name)])
    return 7
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package `gallama` that has the bootstrap, in a folder with another module."""
    package = tmp_path / "packages" / "gallama"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "report.py").write_text(REPORT)
    (package.parent / "neighbour.py").touch()
    shutil.copy(bootstrap.__file__, package)
    return package


def run(package: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    _, *command = bootstrap.command_of("", "gallama.report", *arguments)
    command[command.index(str(Path(bootstrap.__file__).resolve()))] = str(package / "bootstrap.py")
    # Without site-packages: nothing is installed in this interpreter.
    return subprocess.run(
        [sys.executable, "-S", *command], env=variables, capture_output=True, text=True, cwd=package
    )


def test_a_module_runs_where_gallama_is_not_installed_and_finds_its_arguments(package: Path) -> None:
    done = run(package, "first", "second")
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.splitlines()[:2] == [str(package / "__init__.py"), "['first', 'second']"]


def test_nothing_but_the_package_can_be_imported_from_where_it_lies(package: Path) -> None:
    assert run(package).stdout.splitlines()[2] == "[]"


def test_the_gallama_of_the_one_who_starts_it_goes_before_an_installed_one(
    package: Path, tmp_path: Path
) -> None:
    (tmp_path / "installed" / "gallama").mkdir(parents=True)
    (tmp_path / "installed" / "gallama" / "__init__.py").touch()
    done = run(package, PYTHONPATH=str(tmp_path / "installed"))
    assert done.stdout.splitlines()[0] == str(package / "__init__.py")


def test_a_module_that_the_interpreter_lacks_is_named(package: Path) -> None:
    (package / "report.py").write_text("import left_pad\n")
    done = run(package)
    assert done.returncode == 1
    assert done.stderr == (
        f"{sys.executable} has no module 'left_pad', which gallama needs: install gallama there.\n"
    )


def test_a_module_that_gallama_lacks_is_a_bug(package: Path) -> None:
    (package / "report.py").write_text("import gallama.left_pad\n")
    assert "Traceback" in run(package).stderr
