"""The heads of safetensors files: which tensors there are, without reading any.

8 bytes: the length of the JSON behind it
{"model.norm.weight": {"dtype": "F16", "shape": [64], "data_offsets": [0, 128]}, "__metadata__": {...}}
the tensors
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from gallama.errors import InvalidConfig

_LENGTH_BYTES = 8
# Models of 200,000 tensors, the most that are known, have 30 MB, in many files.
_MOST_HEAD_BYTES = 16 * 2**20
_MOST_BYTES_OF_ALL_HEADS = 64 * 2**20
_MOST_FILES = 4096
_CUT_BYTES = 2**18
_BETWEEN_MEMBERS = b'},"'

_Place = Annotated[int, msgspec.Meta(ge=0)]


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """What stands in a head about one tensor."""

    dtype: str
    data_offsets: tuple[_Place, _Place]

    @property
    def stored_bytes(self) -> int:
        return max(0, self.data_offsets[1] - self.data_offsets[0])


_DECODER = msgspec.json.Decoder(Tensor)


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order.

    Raises:
        InvalidConfig: the folder cannot be read, or one is no file.
    """
    try:
        files = sorted(file for file in folder.glob("*.safetensors") if not file.is_dir())
    except OSError as error:
        raise InvalidConfig(f"The folder {folder} cannot be read: {error.strerror}.") from None
    if len(files) > _MOST_FILES:
        raise InvalidConfig(
            f"The folder {folder} has {len(files)} files of weights; {_MOST_FILES} are the most."
        )
    for file in files:
        if not file.is_file():
            problem = "is no regular file" if file.exists() else "is a link that leads nowhere"
            raise InvalidConfig(f"{file} {problem}. Download it again.")
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and description of each tensor of a folder's files, in no order; a file that is none has none.

    Raises:
        InvalidConfig: the folder or a file cannot be read, or heads are absurdly long.
    """
    left_bytes = _MOST_BYTES_OF_ALL_HEADS
    for file in find_weights(folder):
        head = _read_head(file)
        left_bytes -= len(head)
        if left_bytes < 0:
            raise InvalidConfig(
                f"The heads of the weights in {folder} have more than {_MOST_BYTES_OF_ALL_HEADS} bytes."
            )
        yield from _describe(head).items()


def _read_head(path: Path) -> bytes:
    """What stands there where a head would be; nothing where that is longer than the file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > path.stat().st_size:
                return b""
            if length > _MOST_HEAD_BYTES:
                raise InvalidConfig(f"{path}: its head has {length} bytes; {_MOST_HEAD_BYTES} are the most.")
            return file.read(length)
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error.strerror}.") from None


def _describe(head: bytes) -> dict[str, Tensor]:
    try:
        described: dict[str, Tensor] = {}
        for part in _cut(head.strip()):
            described |= {name: _DECODER.decode(raw) for name, raw in part.items() if name != "__metadata__"}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return described


def _cut(head: bytes) -> Iterator[dict[str, msgspec.Raw]]:
    """The members of an object, some at a time: nothing else runs in this process while one is decoded.

    Raises:
        msgspec.DecodeError: it is no object.
    """
    start = 1
    while (end := head.find(_BETWEEN_MEMBERS, start + _CUT_BYTES)) >= 0:
        try:
            yield _decode_members(b"{" + head[start : end + 1] + b"}")
        except msgspec.DecodeError:  # it stands inside of a member: such an object is not cut
            break
        start = end + 2
    yield _decode_members(head[:1] + head[start:])


def _decode_members(text: bytes) -> dict[str, msgspec.Raw]:
    return msgspec.json.decode(text, type=dict[str, msgspec.Raw])
