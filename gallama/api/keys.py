"""Whose key is it, and what may he do: the keys of the settings and of the keys file, which may change."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request

from gallama.api.rate_limits import Account, KeyLimits
from gallama.config import ServerConfig
from gallama.config.keys_file import KeyEntry, digest_of, read_keys_file
from gallama.errors import InvalidConfig, NotAllowed
from gallama.pool.ticket import RequestRecord
from gallama.pool.views import ServedModel

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How long a change of the keys file may stay unseen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, and what he may do."""

    name: str
    is_admin: bool
    models: frozenset[str] | None
    """The models that he may ask, by name or alias; None: all."""
    account: Account

    def may_ask(self, model: ServedModel) -> bool:
        return self.models is None or not self.models.isdisjoint({model.name, *model.aliases})

    def check_model(self, model: ServedModel) -> None:
        """
        Raises:
            NotAllowed: his key does not open this model.
        """
        if not self.may_ask(model):
            raise NotAllowed(f"This key may not ask {model.name}.", param="model")

    def charge(self, record: RequestRecord) -> None:
        self.account.charge(record.prompt_tokens + record.completion_tokens)


ANYBODY = Caller(name="", is_admin=True, models=None, account=Account(KeyLimits()))
"""Whoever asks a server that has no keys."""


def caller_of(request: Request) -> Caller:
    """Who asks, as `KeyCheck` found out."""
    caller = request.scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller


class KeyRing:
    """All keys, as their digests. The file's follow the file; while it is wrong, they stay as they were."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Raises:
            InvalidConfig: the keys file is not there or wrong, or repeats a key of the settings.
        """
        self._file = config.keys_file
        self._clock = clock
        self._last_look = clock()
        self._from_settings = _callers_of_settings(config)
        self._callers = self._from_settings
        self._seen: _Version | None = None
        if self._file is not None:
            self._seen = _version(self._file)
            self._take(read_keys_file(self._file))
            self._warn_if_open()

    @property
    def is_empty(self) -> bool:
        """Whether no key is asked for."""
        return not self._callers

    @property
    def has_admin_keys(self) -> bool:
        return any(caller.is_admin for caller in self._callers.values())

    def find(self, key: bytes) -> Caller | None:
        """Whose key it is; None: nobody's."""
        digest = digest_of(key)
        found = None
        # Every key is compared, each in constant time: how long it takes tells nothing about any of them.
        for known, caller in self._callers.items():
            if hmac.compare_digest(digest, known):
                found = caller
        return found

    def may_manage(self, caller: Caller) -> bool:
        """Whether he may load and unload models: while nobody is an admin, whoever may ask all models may."""
        return caller.is_admin or (not self.has_admin_keys and caller.models is None)

    async def follow_file(self) -> None:
        """Take what the keys file says now, if it has changed; looks at most every `LOOK_SECONDS`."""
        now = self._clock()
        if self._file is None or now - self._last_look < LOOK_SECONDS:
            return
        self._last_look = now
        version = await asyncio.to_thread(_version, self._file)
        if version == self._seen:
            return
        try:
            entries = await asyncio.to_thread(read_keys_file, self._file)
            self._take(entries)
        except InvalidConfig as error:
            logger.error("The keys stay as they were. %s", error.message)
            self._seen = version
            return
        logger.info("Took %d keys from %s", len(entries), self._file)
        self._seen = version
        self._warn_if_open()

    def _take(self, entries: tuple[KeyEntry, ...]) -> None:
        """
        Raises:
            InvalidConfig: a key stands in the settings, too, where it has no limits.
        """
        for entry in entries:
            if entry.digest in self._from_settings:
                twin = self._from_settings[entry.digest].name
                raise InvalidConfig(
                    f"{self._file}: the key of {entry.name!r} is also `{twin}` of the settings; leave one out"
                )
        self._callers = self._from_settings | {entry.digest: self._to_caller(entry) for entry in entries}

    def _to_caller(self, entry: KeyEntry) -> Caller:
        limits = KeyLimits(
            requests_per_minute=entry.requests_per_minute,
            tokens_per_minute=entry.tokens_per_minute,
            max_concurrent_requests=entry.max_concurrent_requests,
        )
        known = self._callers.get(entry.digest)
        account = Account(limits) if known is None else known.account
        account.change(limits)
        models = None if entry.models is None else frozenset(entry.models)
        return Caller(name=entry.name, is_admin=entry.admin, models=models, account=account)

    def _warn_if_open(self) -> None:
        if os.name == "posix" and self._seen is not None and self._seen.mode & 0o077:
            logger.warning(
                "The keys file %s can be read by others than its owner; run `chmod 600` on it", self._file
            )


class _Version(NamedTuple):
    """What changes when a file does."""

    written: int
    size: int
    inode: int
    mode: int


def _version(path: Path) -> _Version | None:
    """None: it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _Version(status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode)


def _callers_of_settings(config: ServerConfig) -> dict[bytes, Caller]:
    """The keys without limits. One that stands in both settings is an admin's."""
    return {
        digest_of(key.encode()): Caller(
            name=f"{setting}[{index}]", is_admin=is_admin, models=None, account=Account(KeyLimits())
        )
        for setting, keys, is_admin in (
            ("api_keys", config.api_keys, False),
            ("admin_keys", config.admin_keys, True),
        )
        for index, key in enumerate(keys)
    }
