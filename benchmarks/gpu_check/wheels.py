"""The packages that the machine with the GPU lacks, as wheels: it reaches no registry."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

MOST_BYTES = 40 * 2**20
"""Of all wheels: with the project beside them they travel in 64 MiB."""
PYTHON = "3.12"
_GLIBC = (39, 38, 37, 36, 35, 34, 31, 28, 27, 24, 17)
_ENVIRONMENT = {
    "implementation_name": "cpython",
    "implementation_version": f"{PYTHON}.0",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_release": "",
    "platform_system": "Linux",
    "platform_version": "",
    "python_full_version": f"{PYTHON}.0",
    "python_version": PYTHON,
    "sys_platform": "linux",
}

ALREADY_THERE = frozenset(
    (
        "annotated-doc",
        "anyio",
        "click",
        "fsspec",
        "h11",
        "jinja2",
        "ninja",
        "numpy",
        "nvidia-ml-py",
        "packaging",
        "pandas",
        "pillow",
        "pip",
        "prometheus-client",
        "psutil",
        "pygments",
        "pytest",
        "pyyaml",
        "regex",
        "rich",
        "safetensors",
        "setuptools",
        "tokenizers",
        "torch",
        "transformers",
        "triton",
        "typing-extensions",
        "uvloop",
    )
)
"""What a machine that is made for PyTorch has beside it. `run` says at once which of these it lacks."""

ROOTS = ("exllamav2==0.3.2", "exllamav3==1.6.5", "pytest-asyncio>=1.2,<2")
"""What is packed beside gallama's own dependencies, each with what it needs itself."""

Fetch = Callable[[Requirement, Path], Path]


class CannotPack(Exception):
    """The wheels do not make up what is needed; the message says why."""


def roots(pyproject: Path) -> list[Requirement]:
    dependencies = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    return [Requirement(text) for text in (*dependencies, *ROOTS)]


def pack(
    wanted: Iterable[Requirement], folder: Path, fetch: Fetch, there: Collection[str] = ALREADY_THERE
) -> list[Path]:
    """Fetch what is wanted, and what that needs, but for what is there already.

    Raises:
        CannotPack: two need different versions of a package, or all are too large together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    wheels: dict[str, Path] = {}
    waiting = list(wanted)
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if name in there or not _applies(requirement):
            continue
        if name in wheels:
            _check_version(wheels[name], requirement)
            continue
        requirement.specifier &= _asked_of(name, waiting)
        wheels[name] = fetch(requirement, folder)
        waiting += needs(wheels[name])
    _check_size(wheels)
    return sorted(wheels.values())


def needs(wheel: Path) -> list[Requirement]:
    """What a wheel says that it needs, extras left out."""
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def fetch_with_pip(requirement: Requirement, folder: Path) -> Path:
    """The wheel for the other machine, whatever this one is.

    Raises:
        CannotPack: the registry has none.
    """
    before = set(folder.glob("*.whl"))
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in _GLIBC]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    asked = f"{requirement.name}{requirement.specifier}"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"),
            *(*platforms, f"--dest={folder}", asked),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise CannotPack(
            f"{asked} cannot be had as a wheel for Python {PYTHON} on Linux: {done.stderr[-500:]}"
        )
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def missing(there: Collection[str], installed: Iterable[str]) -> list[str]:
    """Of the packages that should be there, those that are not."""
    return sorted(set(there) - {canonicalize_name(name) for name in installed})


def _applies(requirement: Requirement) -> bool:
    environment: Mapping[str, str] = {**_ENVIRONMENT, "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(dict(environment))


def _asked_of(name: str, requirements: Iterable[Requirement]) -> SpecifierSet:
    """What all that wait ask of a package together."""
    asked = SpecifierSet()
    for requirement in requirements:
        if canonicalize_name(requirement.name) == name and _applies(requirement):
            asked &= requirement.specifier
    return asked


def _check_version(wheel: Path, requirement: Requirement) -> None:
    version = parse_wheel_filename(wheel.name)[1]
    if not requirement.specifier.contains(version, prereleases=True):
        raise CannotPack(
            f"{wheel.name} is packed, and {requirement} is needed, too; name its version in ROOTS."
        )


def _check_size(wheels: Mapping[str, Path]) -> None:
    sizes = sorted(((wheel.stat().st_size, name) for name, wheel in wheels.items()), reverse=True)
    total = sum(size for size, _ in sizes)
    if total > MOST_BYTES:
        largest = ", ".join(f"{name} {size / 2**20:.1f}" for size, name in sizes[:5])
        raise CannotPack(
            f"The wheels have {total / 2**20:.1f} MiB, and {MOST_BYTES / 2**20:.0f} may travel: {largest}."
        )
