"""A model's vocabulary on disk: llama.cpp tells it token by token, which takes 2 µs each at every start.

A file is one digest and what it is the digest of:

    SHA-256 of the rest (32 bytes), VocabularyTables as msgpack

It is believed only if it is this user's, whole, and fits the model that has been loaded. Whatever is wrong
with it, or with the folder, costs the time that it would have saved, and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_LARGEST_BYTES = 256 << 20


class VocabularyTables(msgspec.Struct, frozen=True, array_like=True):
    """What a model's file and llama.cpp say of its tokens."""

    made_by: str
    """The versions of all that had a part in it."""
    texts: tuple[bytes, ...]
    """Of each token, control tokens by their names."""
    attributes: tuple[int, ...]
    """Of each token: llama.cpp's `llama_token_attr`."""
    end_token_ids: tuple[int, ...]


_DECODER = msgspec.msgpack.Decoder(VocabularyTables)


def cached_tables(
    file: Path, build: Callable[[], VocabularyTables], fits: Callable[[VocabularyTables], bool]
) -> VocabularyTables:
    """The tables that the file has; built, and written there, where it has none that fit.

    Args:
        fits: whether tables are the loaded model's, as far as a quick look can tell.
    """
    found = _read(file)
    if found is not None and fits(found):
        return found
    tables = build()
    try:
        _write(file, tables)
    except OSError as error:
        logger.debug("The vocabulary cannot be kept in %s: %s", file, error)
    return tables


def _read(file: Path) -> VocabularyTables | None:
    try:
        content = _content(file)
        if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
            return None
        return _DECODER.decode(memoryview(content)[_DIGEST_BYTES:])
    except (OSError, msgspec.DecodeError):
        return None


def _content(file: Path) -> bytes:
    """
    Raises:
        OSError: there is no such file, or somebody else may have written it.
    """
    with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as content:
        status = os.fstat(content.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_BYTES:
            raise OSError("not a file that was written here")
        if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            raise PermissionError("others can write it")
        return content.read()


def _write(file: Path, tables: VocabularyTables) -> None:
    """Put the whole file there at once: a worker that starts meanwhile sees it whole or not at all."""
    payload = msgspec.msgpack.encode(tables)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix="new-")  # private to this user
    try:
        with open(handle, "wb") as content:
            content.write(hashlib.sha256(payload).digest() + payload)
        os.replace(name, file)
    except OSError:
        os.unlink(name)
        raise
