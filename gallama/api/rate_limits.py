"""How much a key may ask: requests and tokens in a minute, requests at the same time. Knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from gallama.errors import RateLimited

Clock = Callable[[], int]
"""Nanoseconds since any moment."""

_MINUTE = 60 * 10**9
_SECOND = 10**9
# How long a running request still takes is not known; its end may come at any moment.
_RETRY_CONCURRENT_SECONDS = 1


class Allowance:
    """So many units in a minute: all at once after a pause, then one by one as time gives them back.

    It may go into debt, which time pays off. All sums are whole: no rounding lets one in a moment too early.
    """

    def __init__(self, per_minute: int, clock: Clock = time.monotonic_ns) -> None:
        self.per_minute = per_minute
        self._clock = clock
        # A unit is worth a minute's nanoseconds, and each nanosecond brings `per_minute`.
        self._balance = per_minute * _MINUTE
        self._as_of = clock()

    @property
    def remaining(self) -> int:
        """Whole units that may be taken now."""
        return max(self._now() // _MINUTE, 0)

    @property
    def seconds_until_one(self) -> float:
        return self._seconds_until(_MINUTE)

    @property
    def seconds_until_full(self) -> float:
        return self._seconds_until(self.per_minute * _MINUTE)

    def take(self, units: int) -> None:
        self._balance = self._now() - units * _MINUTE

    def resize(self, per_minute: int) -> None:
        """What has been used stays used."""
        used = self.per_minute * _MINUTE - self._now()
        self.per_minute = per_minute
        self._balance = per_minute * _MINUTE - used

    def _now(self) -> int:
        now = self._clock()
        gained = (now - self._as_of) * self.per_minute
        self._balance = min(self._balance + gained, self.per_minute * _MINUTE)
        self._as_of = now
        return self._balance

    def _seconds_until(self, balance: int) -> float:
        missing = max(balance - self._now(), 0)
        return -(-missing // self.per_minute) / _SECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """None: as much as the server can."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None


class Account:
    """What one key has used of its limits."""

    def __init__(self, limits: KeyLimits, clock: Clock = time.monotonic_ns) -> None:
        self._clock = clock
        self._limits = KeyLimits()
        self._requests: Allowance | None = None
        self._tokens: Allowance | None = None
        self.running = 0
        self.change(limits)

    def change(self, limits: KeyLimits) -> None:
        """Give it other limits; what it has used counts on."""
        self._limits = limits
        self._requests = self._resized(self._requests, limits.requests_per_minute)
        self._tokens = self._resized(self._tokens, limits.tokens_per_minute)

    def enter(self) -> None:
        """Count a request in; `leave` must follow.

        Raises:
            RateLimited: a limit is reached, and nothing was counted.
        """
        most = self._limits.max_concurrent_requests
        if most is not None and self.running >= most:
            raise RateLimited(
                f"As many requests of this key are running as may at the same time: {most}.",
                retry_after_seconds=_RETRY_CONCURRENT_SECONDS,
            )
        _check(self._requests, "requests")
        _check(self._tokens, "tokens")
        if self._requests is not None:
            self._requests.take(1)
        self.running += 1

    def leave(self) -> None:
        self.running -= 1

    def charge(self, tokens: int) -> None:
        """Take off what a request has cost, even if that makes a debt."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """Where it stands, in OpenAI's headers; only of the limits that there are."""
        return _headers(self._requests, "requests") | _headers(self._tokens, "tokens")

    def _resized(self, allowance: Allowance | None, per_minute: int | None) -> Allowance | None:
        if per_minute is None:
            return None
        if allowance is None:
            return Allowance(per_minute, self._clock)
        allowance.resize(per_minute)
        return allowance


def _check(allowance: Allowance | None, what: str) -> None:
    """
    Raises:
        RateLimited: there is nothing left of it.
    """
    if allowance is None or allowance.remaining > 0:
        return
    seconds = allowance.seconds_until_one
    raise RateLimited(
        f"This key may use {allowance.per_minute} {what} per minute, and has; try again in {seconds:.3f} s.",
        retry_after_seconds=seconds,
    )


def _headers(allowance: Allowance | None, what: str) -> dict[str, str]:
    if allowance is None:
        return {}
    return {
        f"x-ratelimit-limit-{what}": str(allowance.per_minute),
        f"x-ratelimit-remaining-{what}": str(allowance.remaining),
        f"x-ratelimit-reset-{what}": _as_duration(allowance.seconds_until_full),
    }


def _as_duration(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1.5s."""
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{minutes:.0f}m{text}s" if minutes else f"{text}s"
