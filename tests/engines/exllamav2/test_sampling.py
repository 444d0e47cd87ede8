from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gallama.engines.exllamav2.sampling import Sampler
from gallama.engines.logits import NEUTRAL
from gallama.engines.transformers import sampling as by_transformers
from gallama.errors import EngineFailed
from gallama.generation import SamplingSettings
from tests.engines.logit_rows import SIZE, logits_with, mask_of

GREEDY = SamplingSettings(temperature=0)


def make(
    settings: SamplingSettings, *, prompt_length: int = 0, size: int = SIZE, unused: Sequence[int] = ()
) -> Sampler:
    return Sampler(settings, prompt_length=prompt_length, vocabulary_size=size, unused_token_ids=unused)


def sample(
    settings: SamplingSettings,
    logits: NDArray[np.float32],
    *,
    allowed: Sequence[int] | None = None,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
) -> int:
    sampler = make(settings, prompt_length=len(prompt))
    return sampler.sample(logits, None if allowed is None else mask_of(allowed), [*prompt, *answer])


def shares(
    settings: SamplingSettings,
    logits: NDArray[np.float32],
    mask: NDArray[np.int32] | None,
    text: Sequence[int],
    *,
    prompt_length: int,
    count: int,
) -> NDArray[np.float64]:
    """How often each token is chosen."""
    sampler = make(settings, prompt_length=prompt_length, size=len(logits))
    chosen = Counter(sampler.sample(logits, mask, text) for _ in range(count))
    return np.array([chosen[token] / count for token in range(len(logits))])


def expected_shares(
    settings: SamplingSettings,
    logits: NDArray[np.float32],
    mask: NDArray[np.int32] | None,
    text: Sequence[int],
    *,
    prompt_length: int,
) -> NDArray[np.float64]:
    """The probabilities after transformers' own processors, in the order of that engine."""
    settings = settings.with_defaults(NEUTRAL)
    scores = torch.from_numpy(logits)[None]
    if mask is not None:
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=len(logits))
        scores = scores.masked_fill(torch.from_numpy(bits == 0)[None], -torch.inf)
    counts = torch.bincount(torch.tensor(text[prompt_length:], dtype=torch.long), minlength=len(logits))
    for penalty in by_transformers._penalties(settings, counts.float()):
        scores = penalty(torch.tensor([text]), scores)
    for warper in by_transformers._warpers(settings):
        scores = warper(torch.empty(0, dtype=torch.long), scores)
    probabilities: NDArray[np.float64] = torch.softmax(scores[0].double(), dim=0).numpy()
    return probabilities


def random_settings(rng: random.Random, size: int) -> SamplingSettings:
    """Some of the settings, each as clients send them."""
    return SamplingSettings(
        temperature=rng.choice([0.5, 1.0, 1.7]),
        top_k=rng.choice([None, 0, 1, 3, 10, size]),
        top_p=rng.choice([None, 0.05, 0.5, 0.9, 1.0]),
        min_p=rng.choice([None, 0.02, 0.3, 1.0]),
        repetition_penalty=rng.choice([None, 0.7, 1.5]),
        frequency_penalty=rng.choice([None, -0.5, 0.8]),
        presence_penalty=rng.choice([None, 0.6]),
        logit_bias=rng.choice([{}, {3: 2.0, 7: -100.0}]),
        seed=rng.randrange(1000),
    )


def test_the_distribution_is_that_of_transformers_with_any_settings() -> None:
    rng, size, count = random.Random(0), 24, 600
    numbers = np.random.default_rng(0)
    for _ in range(40):
        settings = random_settings(rng, size)
        logits = numbers.normal(0, rng.choice([0.5, 3.0]), size).astype(np.float32)
        mask = rng.choice([None, mask_of(rng.sample(range(size), k=rng.randint(2, size)), size)])
        text, prompt_length = rng.choices(range(size), k=12), rng.randint(1, 12)
        seen = shares(settings, logits, mask, text, prompt_length=prompt_length, count=count)
        expected = expected_shares(settings, logits, mask, text, prompt_length=prompt_length)
        assert seen[expected == 0].sum() == 0, settings
        # Of so many samples, the shares are mostly apart by half of this.
        assert np.abs(seen - expected).sum() <= 1.6 * np.sqrt(expected / count).sum(), settings


def test_top_k_and_top_p_find_the_same_tokens_in_a_large_vocabulary() -> None:
    numbers, size = np.random.default_rng(1), 50_000
    for spread, top_p in ((0.01, 0.3), (1.0, 0.9), (5.0, 0.9), (5.0, 0.9999)):
        settings = SamplingSettings(top_p=top_p, top_k=20_000)
        logits = numbers.normal(0, spread, size).astype(np.float32)
        expected = expected_shares(settings, logits, None, [0], prompt_length=1)
        places = make(settings, size=size)._kept_places(logits - logits.max())
        assert places is not None
        # float32 sums of so many numbers are not exact: at the limit a token in a thousand may be another.
        assert abs(len(places) - np.count_nonzero(expected)) <= 1e-3 * len(places) + 1
        assert set(np.argsort(-logits)[: len(places)]) == set(places.tolist())


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sample(GREEDY, logits_with(t7=2, t70=3)) == 70


def test_temperature_zero_takes_the_likeliest_that_is_allowed() -> None:
    assert sample(GREEDY, logits_with(t7=2, t70=3), allowed=[3, 7, 40]) == 7


def test_of_equals_temperature_zero_takes_the_first() -> None:
    assert sample(GREEDY, logits_with(t7=3, t70=3)) == 7


def test_a_temperature_next_to_zero_takes_the_likeliest() -> None:
    for temperature in (1e-9, 1e-38, 5e-324):
        assert sample(SamplingSettings(temperature=temperature), logits_with(t7=2, t70=2.1)) == 70


def test_the_only_allowed_token_is_taken_however_unlikely() -> None:
    for token in (0, 31, 32, 63, 64, SIZE - 1):
        assert sample(SamplingSettings(), logits_with(**{f"t{token}": -1e9}), allowed=[token]) == token


def test_only_allowed_tokens_are_sampled_whatever_the_settings() -> None:
    rng, numbers = random.Random(2), np.random.default_rng(2)
    for _ in range(300):
        allowed = rng.sample(range(SIZE), k=rng.randint(1, SIZE))
        logits = numbers.normal(0, 20, SIZE).astype(np.float32)
        settings = random_settings(rng, SIZE)
        answer = rng.choices(range(SIZE), k=20)
        assert sample(settings, logits, allowed=allowed, prompt=[1, 2], answer=answer) in allowed


def test_ids_that_no_token_has_are_never_sampled() -> None:
    logits = logits_with(t5=50, t6=40)
    for settings in (GREEDY, SamplingSettings(seed=1), SamplingSettings(top_k=2, seed=1)):
        sampler = make(settings, unused=[5, 6])
        assert not {sampler.sample(logits, None, []) for _ in range(100)} & {5, 6}


def test_logits_are_left_as_they_are() -> None:
    logits = np.random.default_rng(3).normal(size=SIZE).astype(np.float32)
    before = logits.copy()
    settings = SamplingSettings(
        top_k=5, top_p=0.5, repetition_penalty=2, presence_penalty=1, logit_bias={1: 5.0}, temperature=0.5
    )
    sampler = make(settings, unused=[4])
    sampler.sample(logits, None, [1, 2, 3])
    sampler.sample(logits, mask_of(range(3, SIZE)), [1, 2, 3, 4])
    assert (logits == before).all()


def test_a_penalty_counts_tokens_that_were_added_between_two_calls() -> None:
    sampler = make(SamplingSettings(temperature=0, frequency_penalty=1), prompt_length=1)
    logits = logits_with(t7=2.5, t8=1)
    chosen, text = [], [7]  # the prompt's does not count
    for added in ([], [7], [7, 9], [9]):
        text += added
        chosen.append(sampler.sample(logits, None, text))
    assert chosen == [7, 7, 8, 8]


def test_a_model_that_computes_no_numbers_is_an_error() -> None:
    for wrong in (np.nan, np.inf):
        for settings in (GREEDY, SamplingSettings(top_k=3)):
            with pytest.raises(EngineFailed, match="no numbers"):
                sample(settings, logits_with(t9=wrong))
            with pytest.raises(EngineFailed, match="no numbers"):
                sample(settings, logits_with(t9=wrong), allowed=[1, 9])


def test_where_all_that_is_allowed_is_impossible_there_is_an_error() -> None:
    with pytest.raises(EngineFailed, match="no numbers"):
        sample(SamplingSettings(), logits_with(t1=-np.inf, t2=-np.inf), allowed=[1, 2])


def test_the_same_seed_chooses_the_same_and_another_something_else() -> None:
    logits = np.zeros(SIZE, dtype=np.float32)

    def chosen(seed: int | None) -> list[int]:
        sampler = make(SamplingSettings(seed=seed))
        return [sampler.sample(logits, None, []) for _ in range(20)]

    assert chosen(5) == chosen(5)
    assert len({tuple(chosen(seed)) for seed in (5, 6, -5, 2**70, None)}) == 5
    assert chosen(None) != chosen(None)
