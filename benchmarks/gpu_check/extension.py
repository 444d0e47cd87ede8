"""The libraries' CUDA extensions: compiled once, then carried back and forth.

Compiling takes minutes, and a machine that is given back forgets it. So the extension, which the library
takes as built where it can be imported by its name, is kept in parts that are small enough to come back.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import places
from benchmarks.gpu_check.findings import Findings
from gallama.engines.cuda_extension import clear_lock, import_with_extension
from gallama.errors import MissingExtra

PART_BYTES = 15 * 2**20
MOST_PARTS = 3
"""Of each extension: eight files come back in all."""


class CannotCompile(Exception):
    """The extension has not come to be; what the compiler said is printed."""


@dataclass(frozen=True)
class Library:
    name: str

    @property
    def extension(self) -> str:
        return f"{self.name}_ext"


LIBRARIES = {"v2": Library("exllamav2"), "v3": Library("exllamav3")}


def build(findings: Findings, engine: str) -> None:
    """Import the library as a worker does, which compiles its extension where there is none yet."""
    library = LIBRARIES[engine]
    file = places.SITE / f"{library.extension}.so"
    tag = built_for()
    if not file.exists():
        findings.figure("restored", restore(parts(places.BACK, library, tag), file))
    started = time.monotonic()
    with telling(findings, places.EXTENSIONS / library.extension):
        try:
            extension = import_library(library)
        except MissingExtra as error:
            # The whole of it: what was compiled beside the file that broke is printed after its errors.
            print(error.__cause__, flush=True)
            raise
    findings.figure("import_seconds", round(time.monotonic() - started, 1))
    found = Path(extension.__file__)
    findings.check("the extension can be imported", found.exists(), file=found.name)
    if found != file:
        findings.figure("megabytes", round(found.stat().st_size / 10**6, 1))
        shutil.copyfile(found, file)
        findings.figure("parts", len(split_in_parts(file, places.BUILT, f"{library.extension}-{tag}")))


def import_library(library: Library) -> Any:
    """The module of the extension."""
    import_with_extension(library.name)
    return getattr(import_module(f"{library.name}.ext"), library.extension)


@contextmanager
def telling(findings: Findings, folder: Path, every_seconds: float = 15) -> Iterator[None]:
    """Keep telling how many files are compiled: when it is stopped, that says how long the rest takes."""
    is_over = threading.Event()

    def tell() -> None:
        while not is_over.wait(every_seconds):
            if folder.exists():
                findings.figure("compiled", compiled(folder))

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def compiled(folder: Path) -> str:
    """As in "12 of 194 files"."""
    plan = folder / "build.ninja"
    objects = re.findall(r"^build \S+\.o:", plan.read_text(), re.MULTILINE) if plan.exists() else []
    return f"{len(list(folder.glob('*.o')))} of {len(objects)} files"


def built_for(capability: tuple[int, int] | None = None) -> str:
    """What an extension must have been built for to be used with this Python.

    Args:
        capability: of the GPU; None: the one that is here.
    """
    import torch

    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    major, minor = capability or torch.cuda.get_device_capability()
    return re.sub(r"[^\w.-]", "_", f"torch{torch.__version__}-{python}-sm{major}{minor}")


def compile_ahead(engine: str, capability: tuple[int, int], environment: Mapping[str, str]) -> list[Path]:
    """Compile an extension where there is no GPU, and put its parts where `build` finds them.

    The library compiles it before it does anything else, and may well break on that there is no GPU later.

    Raises:
        CannotCompile: it has not come to be.
    """
    library = LIBRARIES[engine]
    file = places.EXTENSIONS / library.extension / f"{library.extension}.so"
    file.unlink(missing_ok=True)
    clear_lock(file.with_name("lock"))
    done = subprocess.run(
        [sys.executable, "-c", f"import {library.name}.ext"],
        env={**os.environ, **environment, "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*capability)},
    )
    if not file.exists():
        raise CannotCompile(f"{library.name} has not been compiled: it ended with code {done.returncode}.")
    return split_in_parts(file, places.BACK, f"{library.extension}-{built_for(capability)}")


def split_in_parts(file: Path, folder: Path, name: str, part_bytes: int = PART_BYTES) -> list[Path]:
    """Compress a file into parts; none where that takes more than may come back."""
    folder.mkdir(parents=True, exist_ok=True)
    compressed = lzma.compress(file.read_bytes(), preset=1)
    count = -(-len(compressed) // part_bytes)
    if count > MOST_PARTS:
        print(f"{name} has {len(compressed)} bytes, too many to come back", flush=True)
        return []
    written = []
    for number in range(count):
        part = folder / f"{name}.xz.{number}"
        part.write_bytes(compressed[number * part_bytes : (number + 1) * part_bytes])
        written.append(part)
    return written


def parts(folder: Path, library: Library, tag: str) -> list[Path]:
    return sorted(folder.glob(f"{library.extension}-{tag}.xz.*"))


def restore(found: list[Path], file: Path) -> bool:
    """Make the extension of its parts, unless it cannot be loaded here, and then it is compiled."""
    if not join_parts(found, file):
        return False
    done = subprocess.run([sys.executable, "-c", f"import torch, {file.stem}"], cwd=file.parent)
    if done.returncode:
        file.unlink()
    return done.returncode == 0


def join_parts(found: list[Path], file: Path) -> bool:
    """Make the file of its parts again; False where there are none."""
    if not found:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(lzma.decompress(b"".join(part.read_bytes() for part in found)))
    return True
