"""What a GGUF file says of its model, read without trust: the file may come from anywhere.

    GGUF | version u32 | tensors u64 | pairs u64 | pairs: name, type u32, value | tensors ...

Only the pairs are read, and of them only what the memory that a model needs depends on. Whether the tensors
are as they should be is for the engine to see.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gallama.catalog.gguf_files import parts_of
from gallama.errors import InvalidConfig

_VERSIONS = (2, 3)
# The largest vocabularies take some 20 MB, and have less than a million tokens and merges.
_LARGEST_PAIRS_BYTES = 128 << 20
_MOST_TEXTS = 2_000_000
_MOST_PAIRS = 65_536
_MOST_TENSORS = 2**20
_MOST_KEPT = 256
_MOST_LAYERS = 4096

_CHUNK_BYTES = 1 << 18
_TEXT_LENGTH = struct.Struct("<Q")

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}

_ARCHITECTURE = "general.architecture"
_TOKENS = "tokenizer.ggml.tokens"
_ARCHITECTURE_NAME = re.compile(rb"[a-z0-9][a-z0-9._-]{0,63}")
# Behind the architecture's name and a dot; each with the largest number that is believed.
_LIMITS = {
    "block_count": _MOST_LAYERS,
    "context_length": 2**30,
    "embedding_length": 2**20,
    "feed_forward_length": 2**24,
    "expert_feed_forward_length": 2**24,
    "expert_used_count": 4096,
    "vocab_size": 2**24,
    "full_attention_interval": _MOST_LAYERS,
    "attention.head_count": 2**16,
    "attention.head_count_kv": 2**16,
    "attention.key_length": 2**20,
    "attention.value_length": 2**20,
    "attention.sliding_window": 2**30,
    "ssm.conv_kernel": 2**16,
    "ssm.inner_size": 2**24,
    "ssm.state_size": 2**16,
    "ssm.group_count": 2**16,
    "wkv.head_size": 2**16,
}

_Kept = str | int | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufMetadata:
    """The measures of a model."""

    architecture: str
    tensor_bytes: int
    """Everything in the file, or in all its parts, behind the pairs."""
    context_length: int
    """Tokens that it was trained for."""
    embedding_length: int
    feed_forward_length: int
    """Of the widest layer; of all experts that work at once."""
    head_count: int
    head_counts_kv: tuple[int, ...]
    """Of each layer; 0 for one that keeps a state instead of keys and values."""
    key_length: int
    """Numbers in a key of one head; as many in a value where the file does not say otherwise."""
    value_length: int
    vocabulary_size: int
    has_window: bool
    """Whether some layers may look back only so far."""
    state_length: int
    """Numbers in the state that a layer without keys and values keeps of each sequence."""
    attention_interval: int
    """Every how manieth layer has keys and values."""


class _Broken(Exception):
    """The file is not what it says; the message has no name of it."""


def read_gguf_metadata(file: Path) -> GgufMetadata:
    """The measures of the model in a GGUF file, the first part where it is split.

    Takes less than a second, whatever the file holds, and less than a megabyte.

    Raises:
        InvalidConfig: it cannot be read, or is no GGUF file of a language model, or is damaged.
    """
    try:
        size = _size_of(file)
        with file.open("rb") as content:
            reader = _Reader(content, size)
            kept = _read_pairs(reader)
        sizes = [size, *(_size_of(part) for part in parts_of(file)[1:])]
        return _to_metadata(kept, tensor_bytes=sum(sizes) - reader.position)
    except _Broken as error:
        raise InvalidConfig(f"The model file {file} is damaged or no language model: {error}.") from None
    except OSError as error:
        raise InvalidConfig(f"The model file {file} cannot be read: {error.strerror}.") from None


def _size_of(file: Path) -> int:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
        raise _Broken("it is no ordinary file")
    return status.st_size


class _Reader:
    """A file from its beginning on, up to its end or to where no pairs are believed any more."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.position = 0
        self._file = file
        self._size = size

    def take(self, count: int) -> bytes:
        self._advance(count)
        content = self._file.read(count)
        if len(content) < count:  # it has been shortened meanwhile
            raise _Broken("it ends in the middle of its metadata")
        return content

    def skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(self.position)

    def skip_texts(self, count: int) -> None:
        """Skip texts, each with its length in front; there may be a million of them."""
        while count:
            chunk = self._file.read(_CHUNK_BYTES)
            place, last = 0, len(chunk) - 8
            if last < 0:
                raise _Broken("it ends in the middle of its metadata")
            length_at = _TEXT_LENGTH.unpack_from
            while count and place <= last:
                place += 8 + length_at(chunk, place)[0]
                count -= 1
            self.skip(place)

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self._size:
            raise _Broken("it ends in the middle of its metadata")
        if self.position > _LARGEST_PAIRS_BYTES:
            raise _Broken(f"its metadata take more than {_LARGEST_PAIRS_BYTES >> 20} MiB")


def _read_pairs(reader: _Reader) -> dict[str, _Kept]:
    """The values that matter, by name; of the vocabulary its size."""
    if reader.take(4) != b"GGUF":
        raise _Broken("it does not begin with the letters GGUF")
    version = reader.u32()
    if version not in _VERSIONS:
        raise _Broken(f"it is of GGUF version {version}; versions 2 and 3 are read")
    _bounded("tensors", reader.u64(), _MOST_TENSORS)
    pairs = _bounded("metadata", reader.u64(), _MOST_PAIRS)
    texts = _Texts(reader)
    kept: dict[str, _Kept] = {}
    for _ in range(pairs):
        name = reader.take(_bounded("letters of a name", reader.u64(), 65_535)).decode(errors="replace")
        value = _read_value(reader, name, texts)
        if value is None:
            continue
        if name in kept or len(kept) == _MOST_KEPT:
            raise _Broken(f"it gives {_shown(name)} twice" if name in kept else "it describes several models")
        kept[name] = value
    return kept


class _Texts:
    """Skips texts, so many in all and no more."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._left = _MOST_TEXTS

    def skip(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _Broken(f"it has more than {_MOST_TEXTS} texts")
        self._reader.skip_texts(count)


def _read_value(reader: _Reader, name: str, texts: _Texts) -> _Kept | None:
    """The value that comes next; None, skipped, where it does not matter."""
    value_type = reader.u32()
    matters = name == _ARCHITECTURE or name.partition(".")[2] in _LIMITS
    if value_type == _ARRAY:
        item_type, count = reader.u32(), reader.u64()
        if matters:
            return _read_integers(reader, name, item_type, _bounded(_shown(name), count, _MOST_LAYERS))
        _skip(reader, item_type, count, texts)
        return count if name == _TOKENS else None
    if not matters:
        _skip(reader, value_type, 1, texts)
        return None
    if value_type == _STRING and name == _ARCHITECTURE:
        return _architecture(reader.take(_bounded("letters of an architecture", reader.u64(), 64)))
    return _read_integers(reader, name, value_type, 1)[0]


def _skip(reader: _Reader, value_type: int, count: int, texts: _Texts) -> None:
    if value_type == _STRING:
        texts.skip(count)
    elif value_type in _SIZES:
        reader.skip(_SIZES[value_type] * count)
    else:  # arrays of arrays, too: no model has them
        raise _Broken(f"it has a value of the unknown type {value_type}")


def _read_integers(reader: _Reader, name: str, value_type: int, count: int) -> tuple[int, ...]:
    code = _INTEGERS.get(value_type)
    if code is None or name == _ARCHITECTURE:
        raise _Broken(f"{_shown(name)} is of the wrong type")
    values = [value for (value,) in struct.iter_unpack(code, reader.take(_SIZES[value_type] * count))]
    return tuple(_bounded(_shown(name), value, _LIMITS[name.partition(".")[2]]) for value in values)


def _architecture(name: bytes) -> str:
    if not _ARCHITECTURE_NAME.fullmatch(name):
        raise _Broken("the name of its architecture cannot be")
    return name.decode()


def _bounded(what: str, value: int, most: int) -> int:
    if not 0 <= value <= most:
        raise _Broken(f"it says {value} for {what}, where {most} is the most")
    return value


def _shown(name: str) -> str:
    """A name from the file, as it may stand in a log line."""
    return repr(name[:80])


def _to_metadata(kept: Mapping[str, _Kept], *, tensor_bytes: int) -> GgufMetadata:
    architecture = kept.get(_ARCHITECTURE)
    if not isinstance(architecture, str):
        raise _Broken(f"it does not say {_ARCHITECTURE!r}")
    values = _Measures(architecture, kept)
    layers = values.one("block_count")
    heads = values.largest("attention.head_count", 0)
    embedding_length = values.one("embedding_length")
    head_length = embedding_length // heads if heads else 0
    key_length = values.one("attention.key_length", head_length)
    return GgufMetadata(
        architecture=architecture,
        tensor_bytes=tensor_bytes,
        context_length=values.one("context_length"),
        embedding_length=embedding_length,
        feed_forward_length=max(
            values.largest("feed_forward_length", 0),
            values.one("expert_feed_forward_length", 0) * values.one("expert_used_count", 0),
        ),
        head_count=heads,
        head_counts_kv=values.of_each_layer("attention.head_count_kv", layers, heads),
        key_length=key_length,
        value_length=values.one("attention.value_length", head_length),
        vocabulary_size=values.one("vocab_size", values.vocabulary_size),
        has_window=values.largest("attention.sliding_window", 0) > 0,
        state_length=values.state_length(embedding_length),
        attention_interval=max(1, values.one("full_attention_interval", 1)),
    )


class _Measures:
    """The kept values of one architecture."""

    def __init__(self, architecture: str, kept: Mapping[str, _Kept]) -> None:
        self._architecture = architecture
        self._kept = kept

    @property
    def vocabulary_size(self) -> int:
        size = self._kept.get(_TOKENS, 0)
        assert isinstance(size, int)
        return _bounded("tokens", size, _LIMITS["vocab_size"])

    def one(self, name: str, default: int | None = None) -> int:
        """A single number.

        Raises:
            _Broken: there is none, and it has no default; or there are several.
        """
        value = self._kept.get(f"{self._architecture}.{name}", default)
        if value is None:
            raise _Broken(f"it does not say {self._architecture}.{name}")
        if not isinstance(value, int):
            raise _Broken(f"{self._architecture}.{name} is of the wrong type")
        return value

    def largest(self, name: str, default: int) -> int:
        """A number that may be given for each layer."""
        value = self._kept.get(f"{self._architecture}.{name}", default)
        return max(value, default=default) if isinstance(value, tuple) else self.one(name, default)

    def of_each_layer(self, name: str, layers: int, default: int) -> tuple[int, ...]:
        value = self._kept.get(f"{self._architecture}.{name}", default)
        if not isinstance(value, tuple):
            return (self.one(name, default),) * layers
        if len(value) != layers:
            raise _Broken(f"{self._architecture}.{name} has {len(value)} values for {layers} layers")
        return value

    def state_length(self, embedding_length: int) -> int:
        """As llama.cpp makes it: for Mamba a convolution's and the states of its channels, or RWKV's."""
        channels = self.one("ssm.inner_size", 0)
        states = self.one("ssm.state_size", 0)
        convolved = channels + 2 * self.one("ssm.group_count", 0) * states
        of_mamba = max(0, self.one("ssm.conv_kernel", 0) - 1) * convolved + channels * states
        head_size = self.one("wkv.head_size", 0)
        return of_mamba + (embedding_length * (head_size + 2) if head_size else 0)
