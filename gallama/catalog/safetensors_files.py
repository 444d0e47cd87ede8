"""The heads of safetensors files: which tensors there are, without reading any.

8 bytes: the length of the JSON behind it
{"model.norm.weight": {"dtype": "F16", "shape": [64], "data_offsets": [0, 128]}, "__metadata__": {...}}
the tensors
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from gallama.errors import InvalidConfig

_LENGTH_BYTES = 8
_MOST_HEAD_BYTES = 32 * 2**20
"""Those of models with 100,000 tensors have half of it."""


class Tensor(msgspec.Struct, frozen=True):
    """What stands in a head about one tensor."""

    dtype: str
    data_offsets: tuple[int, int]

    @property
    def stored_bytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and description of each tensor of a folder's files, in no order; a file that is none has none.

    Raises:
        InvalidConfig: the folder or a file cannot be read.
    """
    try:
        for file in sorted(folder.glob("*.safetensors")):
            if file.is_file():
                yield from _read_head(file).items()
    except OSError as error:
        raise InvalidConfig(f"The folder {folder} cannot be read: {error.strerror}.") from None


def _read_head(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > min(_MOST_HEAD_BYTES, path.stat().st_size):
            return {}
        head = file.read(length)
    try:
        described = msgspec.json.decode(head, type=dict[str, msgspec.Raw])
        described.pop("__metadata__", None)
        return {name: msgspec.json.decode(raw, type=Tensor) for name, raw in described.items()}
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
