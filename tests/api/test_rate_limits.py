"""How much a key may ask, by a clock that only moves when told to."""

from __future__ import annotations

import random

import pytest

from gallama.api.rate_limits import Account, Allowance, KeyLimits
from gallama.errors import RateLimited

SECOND = 10**9


class Clock:
    """Nanoseconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 12345

    def __call__(self) -> int:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


def refusal(account: Account) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        account.enter()
    return caught.value


def granted(account: Account, times: int) -> None:
    for _ in range(times):
        account.enter()
        account.leave()


def test_no_span_of_time_grants_more_than_its_share_and_one_full_minutes() -> None:
    rng = random.Random(0)
    for per_minute in (1, 3, 60, 997):
        clock = Clock()
        account = Account(KeyLimits(requests_per_minute=per_minute), clock)
        times: list[int] = []
        for _ in range(400):
            clock.now += rng.choice([0, 1, rng.randrange(90 * SECOND // per_minute)])
            try:
                granted(account, 1)
            except RateLimited:
                continue
            times.append(clock.now)
        for first in range(len(times)):
            for last in range(first, len(times)):
                seconds = (times[last] - times[first]) / SECOND
                assert last - first + 1 <= per_minute + seconds * per_minute / 60 + 1e-6


def test_it_grants_again_exactly_when_it_said() -> None:
    rng = random.Random(1)
    for per_minute in (1, 7, 59, 60, 6000, 10**6 + 3):
        clock = Clock()
        allowance = Allowance(per_minute, clock)
        allowance.take(per_minute + rng.randrange(3 * per_minute))
        wait = round(allowance.seconds_until_one * SECOND)
        clock.now += wait - 1
        assert allowance.remaining == 0, per_minute
        clock.now += 1
        assert allowance.remaining == 1, per_minute


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    account = Account(KeyLimits(requests_per_minute=2), clock)
    granted(account, 2)
    for _ in range(5):
        assert refusal(account).retry_after_seconds == 30
    clock.pass_seconds(30)
    granted(account, 1)


def test_tokens_are_charged_at_the_end_and_a_debt_is_waited_for() -> None:
    clock = Clock()
    account = Account(KeyLimits(tokens_per_minute=600), clock)
    granted(account, 1)
    account.charge(600 + 1200)
    assert refusal(account).retry_after_seconds == pytest.approx(120.1)
    clock.pass_seconds(120)
    refusal(account)
    clock.pass_seconds(0.1)
    granted(account, 1)


def test_as_many_run_at_the_same_time_as_may() -> None:
    account = Account(KeyLimits(max_concurrent_requests=2), Clock())
    account.enter()
    account.enter()
    assert "as may at the same time: 2." in refusal(account).message
    account.leave()
    account.enter()


def test_a_refusal_for_one_limit_leaves_the_others_alone() -> None:
    account = Account(KeyLimits(max_concurrent_requests=1, requests_per_minute=10), Clock())
    account.enter()
    refusal(account)
    assert account.running == 1
    assert account.headers()["x-ratelimit-remaining-requests"] == "9"


def test_the_headers_are_openais() -> None:
    clock = Clock()
    account = Account(KeyLimits(requests_per_minute=60, tokens_per_minute=100), clock)
    granted(account, 1)
    account.charge(700)
    clock.pass_seconds(0.5)
    assert account.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "0.5s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "6m59.5s",
    }


def test_without_limits_nothing_is_counted_or_told() -> None:
    account = Account(KeyLimits(), Clock())
    granted(account, 1000)
    account.charge(10**9)
    assert account.headers() == {}


def test_other_limits_keep_what_was_used() -> None:
    clock = Clock()
    account = Account(KeyLimits(requests_per_minute=10), clock)
    granted(account, 4)
    account.change(KeyLimits(requests_per_minute=20))
    assert account.headers()["x-ratelimit-remaining-requests"] == "16"
    account.change(KeyLimits(requests_per_minute=3))
    assert refusal(account).retry_after_seconds == 40
    account.change(KeyLimits())
    granted(account, 100)
