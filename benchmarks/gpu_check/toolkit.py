"""Where CUDA's toolkit is, as PyTorch and a C++ compiler must be told before an extension is compiled.

Some machines have nvcc in one folder, behind a script elsewhere on PATH, and the headers of cuBLAS and others
only in the packages that PyTorch itself needs. Then PyTorch takes the wrong folder for the toolkit, or the
compiler misses a header.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

_USUAL = Path("/usr/local/cuda/bin/nvcc")
_HEADERS = ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h", "curand_kernel.h")
"""One of each part of the toolkit that PyTorch's headers and the extensions include."""
_RUNTIME = "libcudart.so"
_HEADER_PATH, _LIBRARY_PATH = "CPLUS_INCLUDE_PATH", "LIBRARY_PATH"


def find_nvcc(variables: Mapping[str, str]) -> Path | None:
    """The compiler that is used: CUDA_HOME's, else the one on PATH, else the one in the usual place."""
    named = variables.get("CUDA_HOME") or variables.get("CUDA_PATH")
    if named:
        return Path(named) / "bin" / "nvcc"
    found = shutil.which("nvcc", path=variables.get("PATH"))
    if found:
        return Path(found)
    return _USUAL if _USUAL.exists() else None


def find_toolkit(nvcc: Path) -> Path:
    """The folder that nvcc itself takes for the toolkit's, whatever leads to nvcc."""
    try:
        told = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-E", "/dev/null"], capture_output=True, text=True
        ).stderr
    except OSError:
        told = ""
    found = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return Path(found[1]).resolve() if found else nvcc.resolve().parents[1]


def settings(variables: Mapping[str, str], links: Path) -> dict[str, str]:
    """What is to be set beside these variables; {} where there is no nvcc.

    Args:
        links: a folder for a link to the runtime library, where only a package has that.
    """
    nvcc = find_nvcc(variables)
    if nvcc is None:
        return {}
    home = find_toolkit(nvcc)
    packages = list(package_folders())
    chosen = {"CUDA_HOME": str(home)}
    headers = folders_with(_HEADERS, home, packages)
    if headers:
        chosen[_HEADER_PATH] = _joined(headers, variables.get(_HEADER_PATH))
    library = link_runtime(home, packages, links)
    if library:
        chosen[_LIBRARY_PATH] = _joined([library], variables.get(_LIBRARY_PATH))
    return chosen


def package_folders() -> Iterable[Path]:
    """Of NVIDIA's packages, each with `include` and `lib`."""
    spec = find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        yield from sorted(Path(place).iterdir())


def folders_with(headers: Iterable[str], home: Path, packages: Iterable[Path]) -> list[Path]:
    """The folders that have those headers that the toolkit's own lacks."""
    candidates = [folder / "include" for folder in (home / "targets" / "x86_64-linux", *packages)]
    chosen: list[Path] = []
    for header in headers:
        if any((folder / header).exists() for folder in (home / "include", *chosen)):
            continue
        chosen += [folder for folder in candidates if (folder / header).exists()][:1]
    return chosen


def link_runtime(home: Path, packages: Iterable[Path], links: Path) -> Path | None:
    """A folder with the runtime library by the name that a linker looks for; None: the toolkit has it."""
    if any((home / folder / _RUNTIME).exists() for folder in ("lib64", "lib")):
        return None
    folders = [home / "targets" / "x86_64-linux" / "lib", *(package / "lib" for package in packages)]
    found = [file for folder in folders for file in sorted(folder.glob(f"{_RUNTIME}*"))]
    if not found:
        return None
    links.mkdir(parents=True, exist_ok=True)
    (links / _RUNTIME).unlink(missing_ok=True)
    (links / _RUNTIME).symlink_to(found[0])
    return links


def _joined(folders: Iterable[Path], before: str | None) -> str:
    return ":".join([*([before] if before else []), *map(str, folders)])
