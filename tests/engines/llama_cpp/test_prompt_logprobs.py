"""Log probabilities of a prompt's tokens: of the embedded model, and over a model of a few lines."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.engines.answer_streams import Ended, Job, Started
from gallama.engines.llama_cpp.scheduler import MOST_SCORED_TOKENS
from gallama.engines.llama_cpp.speculation import NgramDrafter
from gallama.engines.logits import log_probabilities
from gallama.generation import Engine, GeneratedChunk, GenerationRequest, SamplingSettings, TokenLogprob
from tests.engines.llama_cpp.test_scheduler import (
    END,
    GREEDY,
    SIZE,
    WITHOUT_END,
    Board,
    _running,
    expected_answer,
    logits_after,
    request,
)

# Longer than what is scored in one step, so that there are several pieces.
TEXT = (
    "The old bridge across the river was built of stone. Every morning the farmers led their carts over it"
    " to the market in the town, and every evening they came back with empty carts and full purses. When the"
    " bridge broke in the great flood, nobody could sell anything for weeks, and so they built a new one."
)


@pytest.fixture
def board() -> Iterator[Board]:
    yield from _running(Board())


async def chunks_of(engine: Engine, generation: GenerationRequest) -> list[GeneratedChunk]:
    async with aclosing(engine.generate(generation)) as chunks:
        return [chunk async for chunk in chunks]


async def scored(engine: Engine, text: str = TEXT, *, max_tokens: int = 0) -> list[GeneratedChunk]:
    prompt = engine.tokenize(text)
    return await chunks_of(
        engine,
        GenerationRequest(
            prompt_token_ids=prompt, max_tokens=max_tokens, sampling=GREEDY, logprobs=3, prompt_logprobs=True
        ),
    )


def all_logits(path: Path, prompt: Sequence[int]) -> NDArray[np.float32]:
    """The logits behind each token, one at a time; shape (tokens, vocabulary).

    Without flash attention, or with many tokens at once, llama.cpp's own numbers differ by a tenth.
    """
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=1, logits_all=True, flash_attn=True, n_threads=2, verbose=False
    )
    try:
        model.eval(list(prompt))
        return np.array(model.scores[: len(prompt)], dtype=np.float32)
    finally:
        model.close()


def toy_logprobs(prompt: Sequence[int], alternatives: int) -> tuple[TokenLogprob | None, ...]:
    behind_first = range(1, len(prompt))
    return None, *(
        log_probabilities(logits_after(prompt[:place]), prompt[place], alternatives) for place in behind_first
    )


def told_logprobs(board: Board, job: Job) -> tuple[TokenLogprob | None, ...]:
    started = board.updates(job)[0]
    assert isinstance(started, Started)
    return started.prompt_logprobs


async def test_prompt_tokens_are_scored_as_the_library_itself_scores_them(
    smollm2: Engine, smollm2_path: Path
) -> None:
    prompt = smollm2.tokenize(TEXT)
    assert len(prompt) > MOST_SCORED_TOKENS
    first, *others = (await scored(smollm2))[0].prompt_logprobs
    logits = all_logits(smollm2_path, prompt)
    assert first is None
    for token, row, entry in zip(prompt[1:], logits, others, strict=False):
        assert entry is not None
        expected = log_probabilities(row, token, 3)
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert [value for _, value in entry.top] == pytest.approx(
            [value for _, value in expected.top], abs=1e-3
        )


async def test_no_token_is_generated_where_none_is_wanted(smollm2: Engine) -> None:
    chunks = await scored(smollm2, max_tokens=0)
    assert "".join(chunk.text for chunk in chunks) == ""
    assert sum(chunk.sampled_tokens for chunk in chunks) == 0
    assert chunks[-1].end == "length"


async def test_an_answer_follows_what_was_scored(smollm2: Engine) -> None:
    chunks = await scored(smollm2, "Count: one, two, three, four, five,", max_tokens=3)
    assert len(chunks[0].prompt_logprobs) == len(smollm2.tokenize("Count: one, two, three, four, five,"))
    assert "".join(chunk.text for chunk in chunks).startswith(" six")
    assert not any(chunk.prompt_logprobs for chunk in chunks[1:])


async def test_a_cached_prompt_is_scored_all_the_same(smollm2: Engine) -> None:
    before = (await scored(smollm2))[0].prompt_logprobs
    again = (await scored(smollm2))[0]
    assert again.cached_prompt_tokens == 0
    assert [entry and entry.token_id for entry in again.prompt_logprobs] == [
        entry and entry.token_id for entry in before
    ]
    assert all(again.prompt_logprobs[1:])


async def test_prompts_are_scored_side_by_side(smollm2: Engine) -> None:
    # A short prompt that shares its step with many tokens is computed by other kernels of llama.cpp:
    # 0.21 apart at most in 150 rounds. Values of another prompt, or of another place, are apart by several.
    texts = [TEXT, TEXT[10:], TEXT[20:90]]
    together = await asyncio.gather(*(scored(smollm2, text) for text in texts))
    for text, chunks in zip(texts, together, strict=True):
        alone = (await scored(smollm2, text))[0].prompt_logprobs[1:]
        found = chunks[0].prompt_logprobs[1:]
        assert [entry.logprob for entry in found if entry] == pytest.approx(
            [entry.logprob for entry in alone if entry], abs=0.5
        )


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 34, 64, 65, 100])
def test_every_length_of_prompt_is_scored_as_a_whole(board: Board, length: int) -> None:
    prompt = [(7 * place) % 38 for place in range(length)]
    for max_tokens in (0, 1, 5):
        job = board.submit(request(prompt, max_tokens=max_tokens, logprobs=2, prompt_logprobs=True))
        assert board.answer(job) == _expected(prompt, max_tokens)
        assert told_logprobs(board, job) == toy_logprobs(prompt, 2)


def _expected(prompt: Sequence[int], max_tokens: int) -> tuple[list[int], str]:
    return expected_answer(prompt, max_tokens) if max_tokens else ([], "length")


def test_an_answer_of_no_tokens_ends_at_once(board: Board) -> None:
    job = board.submit(request([1, 2, 3], max_tokens=0))
    assert board.updates(job) == [Started(0), Ended("length")]


@pytest.mark.parametrize("shares_cells", [True, False])
def test_no_step_computes_more_rows_than_there_is_room_for(shares_cells: bool) -> None:
    board = Board(batch_tokens=64, shares_cells=shares_cells)
    wanted: list[int] = []
    decode = board.kv.decode

    def counted(
        sequences: NDArray[np.int32],
        positions: NDArray[np.int32],
        tokens: NDArray[np.int32],
        wants_logits: NDArray[np.int8],
    ) -> None:
        wanted.append(int(wants_logits.sum()))
        decode(sequences, positions, tokens, wants_logits)

    board.kv.decode = counted  # type: ignore[method-assign]
    prompts = [[(place * factor) % 38 for place in range(90)] for factor in (1, 3, 5, 7)]
    for _ in _running(board):
        jobs = [
            board.submit(request(prompt, max_tokens=4, logprobs=0, prompt_logprobs=True))
            for prompt in prompts
        ]
        assert [told_logprobs(board, job) for job in jobs] == [toy_logprobs(prompt, 0) for prompt in prompts]
    assert max(wanted) <= MOST_SCORED_TOKENS + len(jobs)


def test_others_write_on_while_a_prompt_is_scored(board: Board) -> None:
    writer = board.submit(request([1, 2], max_tokens=200, sampling=WITHOUT_END))
    board.wait_for_tokens(writer)
    prompt = [(5 * place) % 38 for place in range(300)]
    reader = board.submit(request(prompt, max_tokens=0, logprobs=0, prompt_logprobs=True))
    written = len(board.said_so_far(writer))
    assert told_logprobs(board, reader) == toy_logprobs(prompt, 0)
    pieces = len(prompt) // MOST_SCORED_TOKENS
    assert len(board.said_so_far(writer)) >= written + pieces - 1


def test_a_prompt_that_lost_its_place_in_the_cache_is_scored_on() -> None:
    board = Board(cells=150)
    prompts = [[(place * factor) % 38 for place in range(100)] for factor in (3, 5)]
    for _ in _running(board):
        jobs = [
            board.submit(
                request(prompt, max_tokens=20, logprobs=1, prompt_logprobs=True, sampling=WITHOUT_END)
            )
            for prompt in prompts
        ]
        assert [told_logprobs(board, job) for job in jobs] == [toy_logprobs(prompt, 1) for prompt in prompts]
    assert board.kv.computed_tokens > sum(map(len, prompts)) + 2 * 19


def test_a_seeded_answer_is_the_same_beside_its_scored_prompt(board: Board) -> None:
    settings = SamplingSettings(temperature=1.0, seed=4)
    prompt = list(range(30))
    jobs = [
        board.submit(request(prompt, sampling=settings, logprobs=0, prompt_logprobs=scores))
        for scores in (True, False, True)
    ]
    answers = [board.answer(job) for job in jobs]
    assert answers == [answers[0]] * 3


def test_nobody_waits_for_a_prompt_because_it_is_scored() -> None:
    prompt = [(5 * place) % 38 for place in range(300)]
    board = Board(batch_tokens=512)
    scorer = board.submit(request(prompt, max_tokens=0, logprobs=0, prompt_logprobs=True))
    reader = board.submit(request(prompt, max_tokens=1))
    for _ in _running(board):
        assert board.answer(reader) == expected_answer(prompt, 1)
        assert board._updates[scorer] == []
        assert told_logprobs(board, scorer) == toy_logprobs(prompt, 0)


@pytest.mark.parametrize(("cells", "shares_cells"), [(70, True), (120, True), (70, False)])
@pytest.mark.parametrize("batch_tokens", [8, 64])
def test_scores_do_not_depend_on_company_cancellations_or_room(
    cells: int, shares_cells: bool, batch_tokens: int
) -> None:
    """Many random jobs, half of them scored and some given up, in a cache that is far too small for all."""
    rng = random.Random(cells + batch_tokens)
    drafter = NgramDrafter([END])
    board = Board(cells=cells, batch_tokens=batch_tokens, shares_cells=shares_cells, drafter=drafter)
    stems = [[rng.randrange(SIZE) for _ in range(50)] for _ in range(3)]
    for _ in _running(board):
        jobs: dict[Job, tuple[list[int], int, bool]] = {}
        for _ in range(60):
            prompt = [*rng.choice(stems)[: rng.randrange(38)], rng.randrange(SIZE)]
            max_tokens, is_scored = rng.choice([0, 1, 5, 25]), rng.random() < 0.5
            scoring: dict[str, Any] = {"logprobs": 1, "prompt_logprobs": True} if is_scored else {}
            job = board.submit(request(prompt, max_tokens=max_tokens, **scoring))
            if rng.random() < 0.3:
                board.scheduler.cancel(job)
                continue
            jobs[job] = prompt, max_tokens, is_scored
            if rng.random() < 0.3:
                board.answer(rng.choice(list(jobs)))
        for job, (prompt, max_tokens, is_scored) in jobs.items():
            assert board.answer(job) == _expected(prompt, max_tokens)
            assert told_logprobs(board, job) == (toy_logprobs(prompt, 1) if is_scored else ())
        board.wait_until_idle()
        assert not any(sequence.is_busy for sequence in board.cache._sequences)
