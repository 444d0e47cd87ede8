"""Guesses beside what a grammar forces, and of texts side by side."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gallama.constraints import LLGuidanceBackend
from tests.engines.exllamav3.asking import ENDLESS, ask, expect_endless, start_state
from tests.engines.exllamav3.conftest import LoadEngine
from tests.engines.exllamav3.ground import CONTEXT_LENGTH, Ground, save_model


async def test_a_draft_model_goes_on_from_what_a_grammar_has_forced(
    ground: Ground, load: LoadEngine, backend: LLGuidanceBackend, tmp_path: Path
) -> None:
    engine = load(draft_model_id=str(save_model(tmp_path, voice=1, is_draft=True)))
    pattern = r"[cd]{4}The quick brown fox jumps over[cd ]{48}"
    prompt = engine.tokenize("say something now please")
    before = engine.tokenize("c") + engine.tokenize("d") + engine.tokenize("c") + engine.tokenize("d")
    state = start_state(backend, "regex", pattern)
    state.advance(before)
    run = state.forced()
    behind = [token for letter in "c d " * 12 for token in engine.tokenize(letter)]
    # Whoever reads all of it, be it the model or the draft model, knows how it goes on.
    ground.scripts = {tuple(prompt): before, (*prompt, *before, *run): behind}
    answer = await ask(engine, prompt, state=start_state(backend, "regex", pattern), max_tokens=200)
    assert answer.text == "cdcdThe quick brown fox jumps over" + "c d " * 12
    assert answer.forced == len(run)
    assert answer.accepted >= 0.8 * answer.drafted > 0


async def test_a_text_of_which_nothing_is_guessed_takes_no_guesses_from_others(
    ground: Ground, load: LoadEngine
) -> None:
    engine = load(speculative="ngram", num_draft_tokens=15)
    known = list(range(20, 60))
    prompt = [*known, 5, 6, 7, *known[:8]]
    ground.scripts = {tuple(prompt): known[8:]}
    repeated, _ = await asyncio.gather(
        ask(engine, prompt, max_tokens=len(known) - 8),
        ask(engine, [9, 8, 7], sampling=ENDLESS, max_tokens=100),
    )
    assert repeated.accepted > 0.8 * (len(known) - 8)


async def test_a_draft_model_catches_up_with_what_was_written_in_too_large_a_company(
    ground: Ground, load: LoadEngine, tmp_path: Path
) -> None:
    draft = save_model(tmp_path, is_draft=True)  # it says what the model says
    engine = load(max_concurrent_requests=40, cache_size=40 * 512, draft_model_id=str(draft))
    short = [ask(engine, [5 + n, 7], sampling=ENDLESS, max_tokens=20) for n in range(39)]
    last, *_ = await asyncio.gather(ask(engine, [4, 4], sampling=ENDLESS, max_tokens=150), *short)
    assert last.text == expect_endless(ground, engine, [4, 4], 150)
    assert last.accepted > 60


async def test_what_a_draft_model_catches_up_with_is_read_in_chunks(
    ground: Ground, load: LoadEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = save_model(tmp_path, is_draft=True)
    monkeypatch.setattr("gallama.engines.exllamav3.generator.MOST_ROWS", 2)
    engine = load(
        max_concurrent_requests=2,
        cache_size=2 * CONTEXT_LENGTH,
        draft_model_id=str(draft),
        backend_extra_args={"max_chunk_size": 512},
    )
    ground.forget()
    other = ask(engine, [5, 7], sampling=ENDLESS, max_tokens=600)
    last, _ = await asyncio.gather(ask(engine, [4, 4], sampling=ENDLESS, max_tokens=640), other)
    assert last.text == expect_endless(ground, engine, [4, 4], 640)
    assert last.accepted > 15
    assert ground.longest_read == 512
