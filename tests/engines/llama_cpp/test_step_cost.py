from __future__ import annotations

import random

import pytest

from gallama.engines.llama_cpp.step_cost import StepCost


def test_it_finds_what_steps_and_tokens_cost() -> None:
    rng = random.Random(0)
    cost = StepCost()
    for _ in range(200):
        tokens = rng.randrange(1, 100)
        cost.record(tokens, 0.004 + 0.001 * tokens + rng.uniform(-0.0001, 0.0001))
    assert cost.seconds_per_step == pytest.approx(0.004, rel=0.1)
    assert cost.seconds_per_token == pytest.approx(0.001, rel=0.1)
    assert cost.tokens_within(0.054) == pytest.approx(50, abs=2)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    cost = StepCost()
    for step in range(400):
        tokens = 1 + step % 20
        cost.record(tokens, (0.004 + 0.001 * tokens) * (1 if step < 200 else 3))
    assert cost.seconds_per_token == pytest.approx(0.003, rel=0.05)


def test_steps_of_one_length_say_nothing_of_what_a_token_adds() -> None:
    cost = StepCost()
    cost.record(1, 0.010)
    cost.record(9, 0.050)
    for _ in range(300):
        cost.record(1, 0.010)
    assert cost.seconds_per_token == pytest.approx(0.005, rel=0.05)
    assert cost.seconds_per_step + cost.seconds_per_token == pytest.approx(0.010)


def test_nothing_is_ever_for_nothing() -> None:
    rng = random.Random(1)
    cost = StepCost()
    for _ in range(500):
        cost.record(rng.randrange(1, 300), rng.expovariate(100))
        assert cost.seconds_per_token > 0
        assert cost.seconds_per_step >= 0


def test_long_pieces_of_prompts_are_left_out() -> None:
    cost = StepCost()
    cost.record(512, 1.0)
    assert not cost.is_known
    assert cost.tokens_within(10.0) == 0
