"""The file of keys that have names and limits of their own; docs/keys.md explains it.

- {name: office, key: a-long-secret, requests_per_minute: 60}
- {name: operator, key_sha256: 5e88…, admin: true}

No message quotes anything of the file but its lines and the names of settings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from gallama.config.model_spec import ConfigModel, Count, Text, TextList
from gallama.config.problems import KeyPath, validated
from gallama.config.yaml_lines import Lines, line_of, read_yaml
from gallama.errors import InvalidConfig

MAX_FILE_BYTES = 1024 * 1024


def _check_name(name: str) -> str:
    if len(name) > 100:
        raise ValueError("must have 100 characters or fewer")
    return name


def _check_key(key: str) -> str:
    if any(character.isspace() for character in key):
        raise ValueError("must not hold blanks")
    return key


def _check_digest(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ValueError("must be 64 hexadecimal digits, the SHA-256 of a key")
    return digest.lower()


PerMinute = Annotated[Count, Field(ge=1)]


class KeyEntry(ConfigModel):
    """One key of the file: whose it is, and what it opens."""

    name: Annotated[Text, AfterValidator(_check_name)]
    """Whose key it is; logs and traces show it."""
    key: Annotated[Annotated[Text, AfterValidator(_check_key)] | None, Field(repr=False)] = None
    """The key itself."""
    key_sha256: Annotated[Annotated[str, AfterValidator(_check_digest)] | None, Field(repr=False)] = None
    """In its place: the SHA-256 of the key's UTF-8, in hexadecimal."""
    admin: bool = False
    """Whether it opens everything, the management of models as well."""
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    """Tokens of prompts and answers together."""
    max_concurrent_requests: PerMinute | None = None
    models: TextList | None = None
    """The models that it may ask, by name or alias. Default: all."""

    @model_validator(mode="after")
    def _have_one_key(self) -> KeyEntry:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("needs either `key` or `key_sha256`")
        if self.admin and self.models is not None:
            raise ValueError("an admin key opens all models; leave `models` or `admin` out")
        return self

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the key."""
        if self.key is not None:
            return digest_of(self.key.encode())
        assert self.key_sha256 is not None
        return bytes.fromhex(self.key_sha256)


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys_file(path: Path) -> tuple[KeyEntry, ...]:
    """The keys of a file, one or more, with different names.

    Raises:
        InvalidConfig: with file and line, what is wrong; or it holds no key: it would lock out everybody.
    """
    _check_size(path)
    content, lines = read_yaml(path, "keys file")
    if not isinstance(content, list) or not content:
        raise InvalidConfig(f"{path}: must be a list of keys, each as in `- {{name: office, key: SECRET}}`")
    entries = [_entry(path, index, values, lines) for index, values in enumerate(content)]
    _refuse_twins(path, [entry.name for entry in entries], "name", lines)
    _refuse_twins(path, [entry.digest for entry in entries], "key", lines)
    return tuple(entries)


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InvalidConfig(f"The keys file {path} cannot be read: {error.strerror}.") from None
    if size > MAX_FILE_BYTES:
        raise InvalidConfig(f"The keys file {path} is larger than {MAX_FILE_BYTES} bytes.")


def _entry(path: Path, index: int, values: Any, lines: Lines) -> KeyEntry:
    place = f"{path}, line {line_of([index], lines)}"
    if not isinstance(values, dict):
        raise InvalidConfig(f"{place}: must be a mapping as in `name: office`")
    for key in values:
        if key not in KeyEntry.model_fields:
            line = line_of([index, str(key)], lines)
            known = ", ".join(sorted(KeyEntry.model_fields))
            # Not quoted: it may be a key that stands in the wrong place.
            raise InvalidConfig(f"{path}, line {line}: unknown setting. There are: {known}")

    def locate(keys: KeyPath) -> str:
        setting = f", `{keys[0]}`" if keys else ""
        return f"{path}, line {line_of([index, *keys], lines)}{setting}"

    return validated(KeyEntry, values, locate)


def _refuse_twins(path: Path, values: Sequence[Hashable], what: str, lines: Lines) -> None:
    seen: dict[Hashable, int] = {}
    for index, value in enumerate(values):
        line = line_of([index], lines)
        if value in seen:
            raise InvalidConfig(f"{path}, line {line}: has the {what} of line {seen[value]}")
        seen[value] = line
