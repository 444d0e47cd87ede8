"""GGUF files on this machine: alone, in a folder, or split in parts named NAME-00001-of-00003.gguf."""

from __future__ import annotations

import re
from pathlib import Path

from gallama.errors import InvalidConfig

_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)


def find_gguf(path: Path) -> Path:
    """The GGUF file to load for a file or folder that exists; the first part where it is split.

    Raises:
        InvalidConfig: it is no GGUF file, a part is missing, or the folder has none or several.
    """
    file = _only_model_in(path) if path.is_dir() else path
    parts = parts_of(file)
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise InvalidConfig(f"{file} is split, and of its parts these are missing: {', '.join(missing)}.")
    for part in parts:
        _check_magic(part)
    return parts[0]


def model_name_of(path: Path) -> str:
    """The name of a GGUF file without its suffix and part number; the name of a folder as it is."""
    if path.suffix.lower() != ".gguf":
        return path.name
    part = _PART.fullmatch(path.stem)
    return part["name"] if part else path.stem


def parts_of(file: Path) -> list[Path]:
    """All parts of a split model, of which `file` is one; just the file where it is not split."""
    part = _PART.fullmatch(file.stem)
    if part is None:
        return [file]
    numbers = range(1, int(part["count"]) + 1)
    return [file.with_stem(f"{part['name']}-{number:05}-of-{part['count']}") for number in numbers]


def _only_model_in(folder: Path) -> Path:
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    except OSError as error:
        raise InvalidConfig(f"The folder {folder} cannot be read: {error.strerror}.") from None
    first_parts = {parts_of(file)[0]: file for file in files}
    if not first_parts:
        raise InvalidConfig(f"The folder {folder} has no GGUF file.")
    if len(first_parts) > 1:
        names = ", ".join(sorted(first.name for first in first_parts))
        raise InvalidConfig(f"The folder {folder} has several models; name one of the files: {names}.")
    return next(iter(first_parts))


def _check_magic(file: Path) -> None:
    if not file.is_file():  # reading from a pipe or a device could wait for ever
        raise InvalidConfig(f"{file} is no regular file.")
    try:
        with file.open("rb") as content:
            magic = content.read(len(_MAGIC))
    except OSError as error:
        raise InvalidConfig(f"The model file {file} cannot be read: {error.strerror}.") from None
    if magic != _MAGIC:
        raise InvalidConfig(f"{file} is not a GGUF file: it does not begin with the letters GGUF.")
