"""The ground itself: over it, the library's own loop says what the model says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.engines.exllamav3.ground import Ground, save_model, without_gpu  # noqa: E402


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with without_gpu() as ground:
        yield ground


@pytest.fixture(scope="module")
def parts(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Model, cache and tokenizer."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    library = ground.library
    config = library.Config.from_directory(str(folder))
    model = library.Model.from_config(config)
    cache = library.Cache(model, max_num_tokens=8 * 1024)
    model.load()
    return model, cache, library.Tokenizer.from_config(config)


def test_the_library_s_own_loop_says_what_the_model_says(ground: Ground, parts: tuple[Any, Any, Any]) -> None:
    model, cache, tokenizer = parts
    library = ground.library
    generator = library.Generator(model, cache, tokenizer, max_batch_size=4, max_chunk_size=256)
    prompts = [list(range(10 + n, 10 + n + 3 + 61 * n)) for n in range(7)]
    jobs = {
        generator.enqueue(
            library.Job(torch.tensor([prompt]), max_new_tokens=300, sampler=library.GreedySampler())
        ): prompt
        for prompt in prompts
    }
    said: dict[int, list[int]] = {serial: [] for serial in jobs}
    while generator.num_remaining_jobs():
        for result in generator.iterate():
            if "token_ids" in result:
                said[result["serial"]] += result["token_ids"][0].tolist()
    for serial, prompt in jobs.items():
        expected = ground.greedy(prompt, 300, among=range(tokenizer.actual_vocab_size))
        assert said[serial] == expected
    assert ground.pages_in_use == 0
    assert not ground.faults
