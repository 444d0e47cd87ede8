"""The ground that the other tests stand on: the library's generator says over it what its model says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from tests.engines.exllamav2.ground import (
    CONTEXT_LENGTH,
    END_TOKENS,
    PADDED_BY,
    PAGE,
    Ground,
    save_folder,
    vocabulary_size,
)


def build(
    ground: Ground, folder: Path, *, pages: int = 16, draft_folder: Path | None = None, **options: Any
) -> Any:
    """The library's generator over a model of `folder`."""
    from exllamav2.generator import ExLlamaV2DynamicGenerator

    library = ground.exllamav2

    def load(path: Path) -> tuple[Any, Any]:
        config = library.ExLlamaV2Config(str(path))
        model = library.ExLlamaV2(config)
        cache = library.ExLlamaV2Cache(model, max_seq_len=pages * PAGE, lazy=True)
        model.load_autosplit(cache)
        return model, cache

    model, states = load(folder)
    draft_model, draft_states = load(draft_folder) if draft_folder else (None, None)
    return ExLlamaV2DynamicGenerator(
        model,
        states,
        library.ExLlamaV2Tokenizer(model.config),
        max_chunk_size=PAGE,
        max_batch_size=4,
        draft_model=draft_model,
        draft_cache=draft_states,
        **options,
    )


def greedy_job(prompt: list[int], count: int) -> Any:
    """One that takes the likeliest token each time."""
    from exllamav2.ext import none_tensor
    from exllamav2.generator import ExLlamaV2DynamicJob

    class GreedyJob(ExLlamaV2DynamicJob):  # type: ignore[misc]
        def receive_logits(self, logits: torch.Tensor) -> Any:
            row = logits[0, 0, : vocabulary_size() - PADDED_BY].clone()
            row[list(END_TOKENS)] = -torch.inf
            return row.argmax()[None, None], none_tensor, none_tensor, torch.ones((1, 1)), False

    return GreedyJob(torch.tensor([prompt]), count)


def answers(generator: Any, jobs: list[Any]) -> list[list[int]]:
    for job in jobs:
        generator.enqueue(job)
    while generator.num_remaining_jobs():
        generator.iterate()
    return [
        job.sequences[0].sequence_ids.torch()[0, len(job.sequences[0].input_ids) :].tolist() for job in jobs
    ]


def test_a_text_longer_than_a_page_is_what_the_model_says(ground: Ground, tmp_path: Path) -> None:
    generator = build(ground, save_folder(tmp_path))
    assert answers(generator, [greedy_job([5, 6, 7], 300)]) == [ground.greedy([5, 6, 7], 300)]
    assert ground.referenced_pages() == 0


def test_texts_that_share_pages_and_wait_for_pages_are_what_the_model_says(
    ground: Ground, tmp_path: Path
) -> None:
    rng = random.Random(0)
    common = [rng.randrange(3, 400) for _ in range(400)]
    prompts = [common[: rng.randrange(1, 400)] + [n] * rng.randrange(1, 20) for n in range(5, 17)]
    generator = build(ground, save_folder(tmp_path), pages=8)
    assert answers(generator, [greedy_job(prompt, 40) for prompt in prompts]) == [
        ground.greedy(prompt, 40) for prompt in prompts
    ]
    assert ground.prompt_tokens_computed < sum(map(len, prompts)), "common pages are computed once"


def test_drafts_change_nothing_but_the_number_of_steps(ground: Ground, tmp_path: Path) -> None:
    folder, draft = tmp_path / "model", tmp_path / "draft"
    folder.mkdir()
    draft.mkdir()
    generator = build(ground, save_folder(folder), draft_folder=save_folder(draft, disagrees_every=4))
    jobs = [greedy_job([n, n + 1], 300 + generator.num_draft_tokens) for n in (5, 8)]
    assert [tokens[:300] for tokens in answers(generator, jobs)] == [
        ground.greedy([n, n + 1], 300) for n in (5, 8)
    ]
    assert len(ground.steps) < 200
    assert jobs[0].rejected_draft_tokens > 20


def test_a_position_beyond_the_model_s_is_noticed(laid: Ground, tmp_path: Path) -> None:
    laid.reset()
    answers(build(laid, save_folder(tmp_path)), [greedy_job([5] * (CONTEXT_LENGTH - 2), 4)])
    assert any("no place" in violation for violation in laid.violations)
    laid.reset()
