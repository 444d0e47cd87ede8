"""Libraries that compile their CUDA extension when they are imported for the first time, which takes minutes.

    python -P gallama/bootstrap.py gallama.engines.cuda_extension exllamav3

imports one as a worker does, so that `gallama setup` can have that done before the first load. In an
environment that it has built, what is compiled stays inside it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from gallama.catalog.environments import CANNOT_COMPILE_HERE, extensions_folder
from gallama.errors import GallamaError, InvalidConfig, MissingExtra

logger = logging.getLogger(__name__)

_EXTENSIONS_DIR = "TORCH_EXTENSIONS_DIR"
_ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
_LOOK_SECONDS = 1.0
_GIGABYTES_OF_NVCC = 3
_KEPT_CHARACTERS = 20_000


def import_with_extension(library: str) -> None:
    """Import a library whose extension is compiled by that, one process at a time.

    Raises:
        ModuleNotFoundError: torch, the library or something that it imports is not installed.
        InvalidConfig: there is no GPU that this process may use.
        MissingExtra: its extension cannot be compiled or loaded.
    """
    if library in sys.modules:
        return
    import torch

    if not torch.cuda.is_available():
        raise InvalidConfig(
            f"The backend {library} computes on NVIDIA GPUs only, and {_why_none(library, torch)}"
        )
    _prepare_compilation(torch)
    with _alone(_choose_folder(), library):
        try:
            importlib.import_module(library)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # whatever a compiler, a linker or the library's own code makes of it
            logger.error("Importing %s failed: %s", library, str(error)[-_KEPT_CHARACTERS:])
            raise MissingExtra(_explain(library, error, torch)) from error


def _why_none(library: str, torch: Any) -> str:
    if not _has_cuda(torch):
        return (
            f"PyTorch {torch.__version__} was built without CUDA. `gallama setup {library} --recreate`"
            " installs another one, which PIP_CONSTRAINT and PIP_INDEX_URL choose."
        )
    return (
        f"PyTorch {torch.__version__} sees none here. `gpus` or CUDA_VISIBLE_DEVICES may hide them, or their"
        f" driver is older than CUDA {torch.version.cuda} wants."
    )


def _has_cuda(torch: Any) -> bool:
    return torch.version.cuda is not None or torch.version.hip is not None


def _explain(library: str, error: Exception, torch: Any) -> str:
    first_line = (str(error).splitlines() or [""])[0][:300]
    return (
        f"The CUDA extension of {library} cannot be compiled or loaded ({type(error).__name__}:"
        f" {first_line}). It needs a C++ compiler, and CUDA's toolkit with nvcc in the version of PyTorch's"
        f" CUDA ({torch.version.cuda}), found by CUDA_HOME; or a wheel of {library} that has it built, for"
        f" PyTorch {torch.__version__}."
    )


def _choose_folder() -> Path:
    """Where extensions are, which is made known to torch."""
    from torch.utils.cpp_extension import get_default_build_root

    own = extensions_folder(Path(sys.prefix))
    if own.is_dir():
        os.environ.setdefault(_EXTENSIONS_DIR, str(own))
    return Path(os.environ.get(_EXTENSIONS_DIR) or get_default_build_root())


def _prepare_compilation(torch: Any) -> None:
    """Say for what to compile, with how many processes, and where ninja is; what is set already counts."""
    places = map(str, _program_folders())
    os.environ["PATH"] = os.pathsep.join((*places, os.environ.get("PATH", os.defpath)))
    gigabytes = psutil.virtual_memory().available // 2**30
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, gigabytes // _GIGABYTES_OF_NVCC))))
    # Left alone, a library compiles for the GPUs that this process may see, and anew for who sees others.
    wanted = architectures(_capabilities(), torch.cuda.get_arch_list()) if torch.version.cuda else ""
    if wanted:
        os.environ.setdefault(_ARCHITECTURES, wanted)


def _program_folders() -> Iterator[Path]:
    """Where ninja may be, which torch runs by its name though nobody has activated this environment."""
    yield Path(sys.prefix) / "bin"
    package = find_spec("ninja")
    if package is not None and package.origin is not None:
        # Where pip was told to install into a folder, programs are beside the packages.
        yield Path(package.origin).parents[1] / "bin"


def architectures(capabilities: Iterable[tuple[int, int]], supported: Iterable[str]) -> str:
    """What to compile for, as torch takes it: "8.6;8.9+PTX"; "" where that cannot be told.

    Args:
        capabilities: of the GPUs.
        supported: what torch was built for, as in "sm_90" or "sm_100a". A newer GPU runs what is made for
            the newest of these; an older one cannot be compiled for.
    """
    names = (re.fullmatch(r"sm_(\d+)(\d)[af]?", name) for name in supported)
    known = [(int(name[1]), int(name[2])) for name in names if name]
    if not known:
        return ""
    chosen = sorted({min(each, max(known)) for each in capabilities if each >= min(known)})
    return ";".join(f"{major}.{minor}" for major, minor in chosen) + ("+PTX" if chosen else "")


def _capabilities() -> list[tuple[int, int]]:
    """Of all GPUs of the machine; none where the driver does not tell."""
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)) for handle in handles]
    except Exception as error:  # then the library asks torch
        logger.debug("The GPUs cannot be asked: %s", error)
        return []


@contextlib.contextmanager
def _alone(folder: Path, library: str) -> Iterator[None]:
    """Let no other process of gallama import the library, as only one may compile it.

    torch has a lock of its own, a file that a process leaves behind when it is killed; for that the next ones
    would wait for ever.
    """
    import fcntl  # which Windows does not have

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{library}.gallama-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Inside torch's own folder, each version of Python and CUDA has one.
        for left in (*folder.glob(f"{library}_ext/lock"), *folder.glob(f"*/{library}_ext/lock")):
            clear_lock(left)
        yield


def clear_lock(lock: Path) -> None:
    """Take torch's lock away once nobody compiles where it is."""
    while lock.exists() and is_compiling(lock.parent):
        time.sleep(_LOOK_SECONDS)
    lock.unlink(missing_ok=True)


def is_compiling(folder: Path) -> bool:
    """Whether torch's compilation runs there, though the process that wants it may be gone."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "ninja" and Path(process.cwd()) == folder.resolve():
                return True
    return False


def main() -> int:
    logging.basicConfig(format="%(message)s")
    library = sys.argv[1]
    lacking = _what_lacks(library)
    if lacking:
        print(f"That cannot be done here: there is no {lacking}.", file=sys.stderr)
        return CANNOT_COMPILE_HERE
    try:
        import_with_extension(library)
    except GallamaError as error:
        print(f"ERROR: {error.message}", file=sys.stderr)
        return 1
    return 0


def _what_lacks(library: str) -> str:
    """What is not here of all that compiling needs; "" where nothing lacks."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not _has_cuda(torch):
        return f"CUDA in PyTorch {torch.__version__}; PIP_CONSTRAINT and PIP_INDEX_URL choose another one"
    if not torch.cuda.is_available():
        return "GPU that PyTorch sees"
    has_nvcc = CUDA_HOME is not None or find_spec(f"{library}_ext") is not None
    return "" if has_nvcc else "CUDA toolkit with nvcc, which CUDA_HOME may name"


if __name__ == "__main__":
    sys.exit(main())
