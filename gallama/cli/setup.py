"""`gallama setup`: build the Python environment of an engine that needs one of its own.

It is built beside the one that is in use, if there is one, and takes its place when it is complete: a link is
turned over. So a build that fails or is broken off changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gallama.bootstrap import command_of
from gallama.catalog.environments import (
    CANNOT_COMPILE_HERE,
    ENVIRONMENTS,
    OLDEST_PYTHON,
    RECORD_NAME,
    Environment,
    EnvironmentRecord,
    environment_folder,
    extensions_folder,
    interpreter_in,
    read_record,
    requirements_of,
)
from gallama.errors import InvalidConfig, SetupFailed

_INTERRUPTED_STATUS = 130
_KEPT_LINES = 200
_CHECK_SECONDS = 600
"""Importing torch for the first time, from a slow disk, takes its time."""

_TELL_VERSION = "import sys; print('.'.join(map(str, sys.version_info[:3])))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Python:
    """An interpreter of this machine."""

    command: str
    version: str
    """As in 3.11.7."""

    def fits(self, environment: Environment) -> bool:
        minor = tuple(int(part) for part in self.version.split(".")[:2])
        newest = environment.newest_python
        return minor >= OLDEST_PYTHON and (newest is None or minor <= newest)


def describe_setup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", choices=ENVIRONMENTS, help=f"one of: {', '.join(ENVIRONMENTS)}"
    )
    parser.add_argument(
        "--python", metavar="PYTHON", help="the Python to build it with; default: the one that runs gallama"
    )
    parser.add_argument(
        "--recreate", action="store_true", help="build it anew, even where nothing has changed"
    )
    parser.add_argument(
        "--with",
        action="append",
        dest="additions",
        metavar="PACKAGE",
        help="install this besides, as in flash-attn or /path/to/a.whl; may be given several times, and holds"
        " when the environment is built anew",
    )
    parser.set_defaults(command=setup)


def setup(arguments: argparse.Namespace) -> int:
    """
    Returns:
        The exit status.

    Raises:
        InvalidConfig: no Python that is named or found fits.
        SetupFailed: it could not be built.
    """
    environment = ENVIRONMENTS[arguments.name]
    python = _choose_python(environment, arguments.python)
    folder = environment_folder(environment.name, os.environ)
    try:
        with _alone(environment, folder.parent):
            found = read_record(folder)
            wanted = EnvironmentRecord(
                requirements=requirements_of(environment.name),
                additions=_additions(arguments.additions, found),
                python_version=python.version,
            )
            names_python = arguments.python is not None
            if (
                found is not None
                and not arguments.recreate
                and _is_as_wanted(found, wanted, names_python=names_python)
            ):
                _tell(f"{folder} is there, with Python {found.python_version}. --recreate builds it anew.")
            else:
                _build(environment, python, folder, wanted)
    except KeyboardInterrupt:
        _tell("Broken off; nothing has changed.")
        return _INTERRUPTED_STATUS
    except OSError as error:
        raise SetupFailed(f"{folder} cannot be built: {error}.") from error
    return 0


def _is_as_wanted(found: EnvironmentRecord, wanted: EnvironmentRecord, *, names_python: bool) -> bool:
    if names_python and found.python_version != wanted.python_version:
        return False
    return (found.requirements, found.additions) == (wanted.requirements, wanted.additions)


def _additions(asked: Sequence[str] | None, found: EnvironmentRecord | None) -> tuple[str, ...]:
    """What to install beside the requirements: what is asked for, else what was before.

    Raises:
        InvalidConfig: it would be an option of pip.
    """
    if asked is None:
        return () if found is None else found.additions
    for package in asked:
        if not package.strip() or package.startswith("-"):
            raise InvalidConfig(f"--with: {package!r} is no package.")
    return tuple(map(_whole_path, asked))


def _whole_path(package: str) -> str:
    """A file or folder by its whole path: the next time, it may be asked for from elsewhere."""
    is_path = (os.sep in package or package.endswith(".whl")) and os.path.exists(package)
    return os.path.abspath(package) if is_path else package


def _choose_python(environment: Environment, named: str | None) -> Python:
    """The interpreter that is named; else this one, or another that is found by its name, if they fit.

    Raises:
        InvalidConfig: none fits.
    """
    if named is not None:
        command = shutil.which(os.path.expanduser(named))
        python = None if command is None else _examine(command)
        if python is None:
            raise InvalidConfig(f"--python: {named!r} is no Python that runs.")
        if not python.fits(environment):
            raise InvalidConfig(
                f"--python: {named!r} is Python {python.version};"
                f" {environment.name} needs {_range_of(environment)}."
            )
        return python
    names = [sys.executable, *(f"python3.{minor}" for minor in range(14, OLDEST_PYTHON[1] - 1, -1))]
    found = (_examine(command) for name in names if (command := shutil.which(name)) is not None)
    fitting = next((python for python in found if python is not None and python.fits(environment)), None)
    if fitting is None:
        raise InvalidConfig(
            f"{environment.name} needs {_range_of(environment)}, and there is none;"
            f" install one, and name it with `{environment.command} --python PYTHON`."
        )
    return fitting


def _examine(command: str) -> Python | None:
    """Which Python a program is; None where it is none."""
    try:
        told = subprocess.run([command, "-c", _TELL_VERSION], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = told.stdout.strip()
    return Python(command=command, version=version) if re.fullmatch(r"\d+\.\d+\.\d+", version) else None


def _range_of(environment: Environment) -> str:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if environment.newest_python is None:
        return f"Python {oldest} or newer"
    return f"a Python from {oldest} to {'.'.join(map(str, environment.newest_python))}"


@contextlib.contextmanager
def _alone(environment: Environment, folder: Path) -> Iterator[None]:
    """Let no other process build the same environment, and clear away what one that was killed has left.

    Raises:
        SetupFailed: one does.
    """
    import fcntl  # which Windows does not have

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{environment.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupFailed(f"Another `{environment.command}` is at work.") from None
        _clear_away_unused(environment, folder)
        yield
        _clear_away_unused(environment, folder)


def _clear_away_unused(environment: Environment, folder: Path) -> None:
    in_use = folder / (folder / environment.name).resolve().name
    for build in folder.glob(f".{environment.name}-*"):
        if build.is_symlink():
            build.unlink()
        elif build != in_use:
            shutil.rmtree(build, ignore_errors=True)


def _build(environment: Environment, python: Python, folder: Path, record: EnvironmentRecord) -> None:
    """Build an environment and let it take the place of the one there was.

    Raises:
        SetupFailed: it cannot be built, or what was installed cannot be imported.
    """
    start = time.monotonic()
    # Workers find it by this path, too: to compilers another one is another file.
    build = folder.parent.resolve() / f".{environment.name}-{secrets.token_hex(4)}"
    _tell(f"Building {folder} with Python {python.version} ({python.command}).")
    try:
        _make_environment(python, build)
        _tell("Installing what it needs; torch alone takes some minutes where the network is slow.")
        _install(build, record.requirements)
        for package in record.additions:
            # Such a package is often compiled against what was installed before.
            _tell(f"Installing {package}.")
            _install(build, ("--no-build-isolation", *record.requirements, package))
        plain = [module for module in environment.modules if module != environment.compiled]
        _tell(f"Checking that {', '.join(plain)} can be imported.")
        _check_imports(build, plain)
        if environment.compiled is not None:
            _compile(build, environment.compiled)
        (build / RECORD_NAME).write_bytes(msgspec.json.encode(record))
        _put_in_place(build, folder)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)
        raise
    seconds, gigabytes = time.monotonic() - start, _size_bytes(build) / 10**9
    _tell(f"Done in {seconds:.0f} s: {folder} takes {gigabytes:.1f} GB. Models with the backend")
    _tell(f"{environment.name} run in it from now on; those that are loaded, when they are loaded anew.")
    option = environment.option
    if option is not None and not any(build.glob(f"lib/python3*/site-packages/{option.module}")):
        _tell(f"{option.purpose} To have it: {environment.command} --with {option.package}")


def _make_environment(python: Python, build: Path) -> None:
    made = subprocess.run(
        [python.command, "-m", "venv", str(build)],
        env=_variables(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if made.returncode:
        raise SetupFailed(
            f"{python.command} -m venv failed: {_last_words(made.stdout.splitlines())}."
            " Debian has it in a package of its own, python3-venv."
        )


def _install(build: Path, requirements: Sequence[str]) -> None:
    """Let pip choose versions that go together, and install them; what it says is shown as it comes.

    Raises:
        SetupFailed: it could not.
    """
    pip = [str(interpreter_in(build)), "-m", "pip", "install", "--disable-pip-version-check"]
    # Its output goes where ours goes, so that in a terminal there are progress bars.
    sys.stdout.flush()
    with subprocess.Popen(
        [*pip, *requirements], env=_variables(), stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        try:
            complaints = _pass_on(process)
        except BaseException:
            # Ctrl-C in a terminal reaches pip, too; a signal to this process alone does not.
            process.kill()
            raise
    if process.returncode:
        raise SetupFailed(explain_pip(complaints, build.parent))


def _pass_on(process: subprocess.Popen[str]) -> list[str]:
    """Print what a process writes on its error output, until its end; returns the last lines."""
    assert process.stderr is not None
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        kept.append(line.strip())
    return list(kept)


def explain_pip(complaints: Sequence[str], folder: Path) -> str:
    """Why pip failed, and what can be done.

    Args:
        complaints: the lines of its error output.
        folder: where the environment was to be.
    """
    text = "\n".join(complaints)
    if "No space left on device" in text:
        free = shutil.disk_usage(folder).free / 10**9
        return (
            f"The disk is full ({free:.1f} GB are free in {folder}). GALLAMA_HOME names another place for"
            " environments, PIP_CACHE_DIR and TMPDIR for what pip keeps on the way."
        )
    if "Retrying (" in text and "Could not find a version" in text:
        return (
            "The package index cannot be reached. pip finds another one, or files, by PIP_INDEX_URL,"
            " PIP_FIND_LINKS or its config file, and a proxy by HTTPS_PROXY."
        )
    return f"pip could not install it: {_last_words(complaints)}."


def _compile(build: Path, module: str) -> None:
    """Import a module that compiles its CUDA extension, where that can be done.

    Raises:
        SetupFailed: it could be done, but failed.
    """
    folder = extensions_folder(build)
    folder.mkdir()
    _tell(f"Compiling the CUDA extension of {module} for the GPUs of this machine, which takes some minutes.")
    sys.stdout.flush()
    with subprocess.Popen(
        command_of(str(interpreter_in(build)), "gallama.engines.cuda_extension", module),
        env=_variables(),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            complaints = _pass_on(process)
        except BaseException:
            # The compilers that it has started belong to its session, and would go on.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode == CANNOT_COMPILE_HERE:
        _tell("It will be compiled when a model is first loaded where it can be.")
    elif process.returncode:
        raise SetupFailed(f"{module} cannot be compiled: {_last_words(complaints)}.")


def _check_imports(build: Path, modules: Sequence[str]) -> None:
    command = [str(interpreter_in(build)), "-P", "-c", f"import {', '.join(modules)}"]
    try:
        checked = subprocess.run(
            command,
            env=_variables(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_CHECK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise SetupFailed(f"Importing what was installed takes more than {_CHECK_SECONDS} s.") from None
    if checked.returncode:
        raise SetupFailed(
            f"What was installed cannot be imported: {_last_words(checked.stderr.splitlines())}."
        )


def _put_in_place(build: Path, folder: Path) -> None:
    """Let the link lead to the build; whatever was there before is cleared away afterwards."""
    link = build.with_name(f"{build.name}.link")
    link.symlink_to(build.name)
    if folder.is_dir() and not folder.is_symlink():
        folder.rename(build.with_name(f"{build.name}.former"))
    link.replace(folder)


def _variables() -> dict[str, str]:
    """Our environment, with all that is for pip, and without what tells this Python where its modules are."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}


def _last_words(lines: Sequence[str]) -> str:
    """The first error that a program has told, or else its last line."""
    told = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in told if line.startswith("ERROR:")]
    return ([*errors, *told[-1:]] or ["it said nothing"])[0].rstrip(".")


def _size_bytes(folder: Path) -> int:
    """What the files of a folder take of the disk."""
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*") if not file.is_dir())


def _tell(line: str) -> None:
    print(line, flush=True)
