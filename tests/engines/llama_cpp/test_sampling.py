from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.engines.llama_cpp.bindings import Candidates
from gallama.engines.llama_cpp.sampling import Sampler
from gallama.engines.logits import allowed_tokens, log_probabilities
from gallama.generation import SamplingSettings
from tests.engines.logit_rows import SIZE, logits_with, mask_of

GREEDY = SamplingSettings(temperature=0)


def make(settings: SamplingSettings, prompt: Sequence[int] = ()) -> Sampler:
    return Sampler(
        settings,
        vocabulary_size=SIZE,
        context_length=256,
        prompt_token_ids=prompt,
        candidates=Candidates(SIZE),
    )


def sample(
    settings: SamplingSettings,
    logits: NDArray[np.float32],
    *,
    allowed: Sequence[int] | None = None,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
) -> int:
    sampler = make(settings, prompt)
    sampler.accept(answer)
    token = sampler.sample(logits, None if allowed is None else mask_of(allowed))
    sampler.close()
    return token


def sample_many(settings: SamplingSettings, logits: NDArray[np.float32], count: int = 300) -> list[int]:
    sampler = make(settings)
    tokens = [sampler.sample(logits, None) for _ in range(count)]
    sampler.close()
    return tokens


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sample(GREEDY, logits_with(t7=2, t70=3)) == 70


def test_temperature_zero_takes_the_likeliest_that_is_allowed() -> None:
    assert sample(GREEDY, logits_with(t7=2, t70=3), allowed=[3, 7, 40]) == 7


def test_the_only_allowed_token_is_taken_however_unlikely() -> None:
    for token in (0, 31, 32, 63, 64, SIZE - 1):
        logits = logits_with(**{f"t{token}": -1e9})
        assert sample(SamplingSettings(), logits, allowed=[token]) == token


@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 100, 4099])
def test_allowed_tokens_are_the_bits_that_are_set(size: int, density: float) -> None:
    rng = random.Random(size)
    for _ in range(20):
        mask = np.zeros((size + 31) // 32, dtype=np.int32)
        expected = [token for token in range(size) if rng.random() < density]
        for token in expected:
            mask.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))
        # Padding of the last word is no token, whatever a grammar leaves there.
        for token in range(size, len(mask) * 32):
            mask.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))
        assert allowed_tokens(mask, size).tolist() == expected


def test_a_single_bit_is_found_wherever_it_is() -> None:
    for token in range(SIZE):
        assert allowed_tokens(mask_of([token]), SIZE).tolist() == [token]


def test_logits_are_left_as_they_are() -> None:
    logits = logits_with(t7=2, t70=3)
    before = logits.copy()
    sample(SamplingSettings(temperature=0.5, frequency_penalty=1, top_p=0.5), logits, answer=[7])
    assert (logits == before).all()


def test_biases_are_added() -> None:
    assert sample(SamplingSettings(temperature=0, logit_bias={7: 5}), logits_with(t70=3)) == 7
    assert sample(SamplingSettings(temperature=0, logit_bias={70: -100}), logits_with(t70=3, t2=1)) == 2


def test_a_bias_cannot_lift_a_token_over_the_grammar() -> None:
    settings = SamplingSettings(temperature=0, logit_bias={7: 100})
    assert sample(settings, logits_with(t70=3), allowed=[1, 2, 70]) == 70


def test_top_k_of_one_is_greedy() -> None:
    assert set(sample_many(SamplingSettings(top_k=1, seed=1), logits_with(t70=0.1))) == {70}


def test_top_k_keeps_so_many_tokens() -> None:
    logits = logits_with(t1=3, t2=3, t3=3)
    assert set(sample_many(SamplingSettings(top_k=3, seed=1), logits)) == {1, 2, 3}


def test_top_p_keeps_the_likeliest_tokens_that_make_up_so_much() -> None:
    logits = np.full(SIZE, -50, dtype=np.float32)
    logits[[1, 2, 3]] = np.log([0.6, 0.3, 0.1])
    assert set(sample_many(SamplingSettings(top_p=0.7, seed=1), logits)) == {1, 2}


def test_min_p_drops_what_is_so_much_less_likely_than_the_first() -> None:
    logits = np.full(SIZE, -50, dtype=np.float32)
    logits[[1, 2, 3]] = np.log([0.6, 0.3, 0.1])
    assert set(sample_many(SamplingSettings(min_p=0.4, seed=1), logits)) == {1, 2}


def test_tokens_are_sampled_as_often_as_they_are_likely() -> None:
    logits = np.full(SIZE, -50, dtype=np.float32)
    logits[[1, 2]] = np.log([0.75, 0.25])
    counts = Counter(sample_many(SamplingSettings(temperature=1, seed=3), logits, count=2000))
    assert counts[1] / 2000 == pytest.approx(0.75, abs=0.05)
    squared = Counter(sample_many(SamplingSettings(temperature=0.5, seed=3), logits, count=2000))
    assert squared[1] / 2000 == pytest.approx(0.9, abs=0.05), "half the temperature squares probabilities"


@pytest.mark.parametrize("seed", [-1, 2**32 - 2, 2**32 - 1, 2**64 - 1, -(2**63)])
def test_seeds_that_follow_each_other_give_different_tokens(seed: int) -> None:
    logits = np.zeros(SIZE, dtype=np.float32)
    runs = [tuple(sample_many(SamplingSettings(seed=seed + choice), logits, count=20)) for choice in range(4)]
    assert len(set(runs)) == 4


def test_equal_seeds_give_equal_tokens_and_others_do_not() -> None:
    logits = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    runs = {seed: sample_many(SamplingSettings(seed=seed), logits, count=50) for seed in (0, 1, 2**40, -5)}
    for seed, tokens in runs.items():
        assert sample_many(SamplingSettings(seed=seed), logits, count=50) == tokens
    assert len({tuple(tokens) for tokens in runs.values()}) == len(runs)


@pytest.mark.parametrize("seed", [2**32 - 1, -1, 0xFFFFFFFF << 32])
def test_no_seed_means_random_to_llama_cpp(seed: int) -> None:
    logits = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    settings = SamplingSettings(seed=seed)
    assert sample_many(settings, logits, count=20) == sample_many(settings, logits, count=20)


def test_without_a_seed_two_answers_differ() -> None:
    logits = np.zeros(SIZE, dtype=np.float32)
    assert sample_many(SamplingSettings(), logits, count=20) != sample_many(
        SamplingSettings(), logits, count=20
    )


def test_the_repetition_penalty_counts_prompt_and_answer() -> None:
    settings = SamplingSettings(temperature=0, repetition_penalty=2)
    logits = logits_with(t1=4, t2=3)
    assert sample(settings, logits) == 1
    assert sample(settings, logits, prompt=[1]) == 2
    assert sample(settings, logits, answer=[1]) == 2
    assert sample(settings, logits, prompt=[1, 2]) == 1


@pytest.mark.parametrize("field", ["frequency_penalty", "presence_penalty"])
def test_the_other_penalties_count_the_answer_only(field: str) -> None:
    settings = SamplingSettings(temperature=0, **{field: 2.0})  # type: ignore[arg-type]
    logits = logits_with(t1=4, t2=3)
    assert sample(settings, logits, prompt=[1]) == 1
    assert sample(settings, logits, answer=[1]) == 2


def test_frequency_counts_how_often_and_presence_only_whether() -> None:
    logits = logits_with(t1=4, t2=3)
    often = [1, 1, 2]
    assert sample(SamplingSettings(temperature=0, frequency_penalty=1.5), logits, answer=often) == 2
    assert sample(SamplingSettings(temperature=0, presence_penalty=1.5), logits, answer=often) == 1


def test_penalties_hold_under_a_grammar() -> None:
    settings = SamplingSettings(temperature=0, presence_penalty=2)
    assert sample(settings, logits_with(t1=4, t2=3, t3=9), allowed=[1, 2], answer=[1]) == 2


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits = np.random.default_rng(0).normal(scale=5, size=SIZE).astype(np.float32)
    everything = log_probabilities(logits, 7, SIZE)
    assert sum(math.exp(value) for _, value in everything.top) == pytest.approx(1)
    assert everything.logprob == pytest.approx(dict(everything.top)[7])
    shift = float(logits[7]) - float(logits[8])
    assert everything.logprob - dict(everything.top)[8] == pytest.approx(shift, rel=1e-4)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_alternatives_are_the_likeliest_in_order(count: int) -> None:
    logits = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    top = log_probabilities(logits, 7, count).top
    assert [token for token, _ in top] == np.argsort(-logits)[:count].tolist()
    assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)


def test_large_logits_do_not_overflow() -> None:
    assert log_probabilities(logits_with(t7=1e4), 7, 1).logprob == pytest.approx(0)
    assert log_probabilities(logits_with(t7=-1e4), 7, 1).logprob < -1e3


def test_nothing_outside_the_grammar_is_ever_sampled_whatever_the_settings() -> None:
    rng = random.Random(0)
    noise = np.random.default_rng(0)
    for _ in range(300):
        settings = random_settings(rng)
        logits = noise.normal(scale=rng.choice([0.1, 3, 50]), size=SIZE).astype(np.float32)
        allowed = rng.sample(range(SIZE), k=rng.choice([1, 2, 5, 40, SIZE]))
        sampler = make(settings, prompt=rng.choices(range(SIZE), k=20))
        for _ in range(5):
            token = sampler.sample(logits, mask_of(allowed))
            assert token in allowed, settings
            sampler.accept([token])
        sampler.close()


def random_settings(rng: random.Random) -> SamplingSettings:
    return SamplingSettings(
        temperature=rng.choice([None, 0, 1e-3, 0.7, 2]),
        top_p=rng.choice([None, 1e-6, 0.5, 1]),
        top_k=rng.choice([None, 0, 1, 5, SIZE * 2]),
        min_p=rng.choice([None, 0, 0.2, 1]),
        repetition_penalty=rng.choice([None, 0.5, 1, 10]),
        frequency_penalty=rng.choice([None, -2, 0, 2]),
        presence_penalty=rng.choice([None, -2, 0, 2]),
        seed=rng.choice([None, rng.randrange(2**63)]),
        logit_bias={rng.randrange(SIZE): rng.uniform(-100, 100) for _ in range(rng.randrange(4))},
    )
