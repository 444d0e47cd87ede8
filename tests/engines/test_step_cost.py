from __future__ import annotations

import random

import pytest

from gallama.engines.step_cost import StepCost


def learned(cost_of: dict[int, float]) -> StepCost:
    cost = StepCost()
    for tokens, seconds in cost_of.items():
        cost.record(tokens, seconds)
    return cost


def test_it_finds_what_steps_cost_whatever_their_size() -> None:
    rng = random.Random(0)
    cost = StepCost()
    for _ in range(400):
        tokens = rng.randrange(1, 100)
        cost.record(tokens, 0.004 + 0.001 * tokens + rng.uniform(-0.0001, 0.0001))
    for tokens in (1, 2, 5, 17, 40, 90):
        assert cost.seconds(tokens) == pytest.approx(0.004 + 0.001 * tokens, rel=0.1)
    assert cost.tokens_within(0.054) == pytest.approx(50, rel=0.3)


def test_between_two_sizes_it_draws_a_line_and_beyond_them_in_proportion() -> None:
    cost = learned({1: 0.010, 41: 0.090})
    assert cost.seconds(21) == pytest.approx(0.050)
    assert cost.seconds(82) == pytest.approx(0.180)
    assert learned({10: 0.02}).seconds(1) == 0.02


def test_small_sizes_are_told_apart() -> None:
    cost = learned({1: 0.0075, 2: 0.0136, 3: 0.0193, 4: 0.0213})
    assert [cost.seconds(tokens) for tokens in (1, 2, 3, 4)] == [0.0075, 0.0136, 0.0193, 0.0213]


def test_it_follows_a_machine_that_becomes_slower() -> None:
    cost = StepCost()
    for step in range(400):
        cost.record(1 + step % 20, (0.004 + 0.001 * (1 + step % 20)) * (1 if step < 200 else 3))
    assert cost.seconds(10) == pytest.approx(0.042, rel=0.05)


def test_one_step_that_was_held_up_says_little() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.record(1, 0.010)
    cost.record(1, 30.0)
    assert cost.seconds(1) < 0.013


def test_what_was_learned_long_ago_is_forgotten() -> None:
    cost = learned({1: 0.010, 8: 30.0})
    for _ in range(600):
        cost.record(1, 0.010)
    assert cost.seconds(8) == pytest.approx(0.080)
    cost.record(8, 0.050)
    assert cost.seconds(8) == 0.050


def test_it_says_nothing_before_the_first_step() -> None:
    assert not StepCost().is_known
    assert StepCost().tokens_within(10.0) == 0


def test_no_size_fits_into_no_time() -> None:
    assert learned({1: 0.010, 100: 0.5}).tokens_within(0.001) == 0
