"""The engine over exllamav3 itself, on the ground that needs no GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from gallama.constraints import LLGuidanceBackend
from gallama.engines.generators.engine import GeneratorEngine
from tests.engines.exllamav3.ground import Ground, save_model, without_gpu

LoadEngine = Callable[..., GeneratorEngine]


@pytest.fixture(scope="module")
def module_ground() -> Iterator[Ground]:
    with without_gpu() as ground:
        yield ground


@pytest.fixture
def ground(module_ground: Ground) -> Iterator[Ground]:
    """As new for each test, in which nothing may be computed from what nobody wrote."""
    module_ground.forget()
    yield module_ground
    assert not module_ground.faults


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(module_ground: Ground, folder: Path) -> Iterator[GeneratorEngine]:
    """With room for all of its slots at once."""
    engine = _load(folder, cache_size=16 * 1024)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture
def load(ground: Ground, folder: Path) -> Iterator[LoadEngine]:
    """Load an engine of the test's own; it is closed at the end."""
    engines: list[GeneratorEngine] = []

    def load(path: Path = folder, **settings: Any) -> GeneratorEngine:
        engines.append(_load(path, **settings))
        return engines[-1]

    yield load
    for engine in engines:
        asyncio.run(engine.close())


@pytest.fixture(scope="session")
def backend(folder: Path) -> LLGuidanceBackend:
    from gallama.engines.tokenizer_folder import read_folder_tokens

    return LLGuidanceBackend(read_folder_tokens(folder, _spec(folder)).vocabulary)


def _load(path: Path, **settings: Any) -> GeneratorEngine:
    from gallama.engines.exllamav3 import load

    return load(_spec(path, **settings), path)


def _spec(path: Path, **settings: Any) -> Any:
    from gallama.config import ModelSpec

    settings.setdefault("max_concurrent_requests", 16)
    return ModelSpec.model_validate({"model_id": str(path), "backend": "exllamav3", **settings})
