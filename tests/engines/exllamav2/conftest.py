"""The exllamav2 engine over the library's own generator, on a ground that needs no GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from gallama.config import ModelSpec
from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint, ConstraintKind
from gallama.engines import ENGINES
from gallama.engines.tokenizer_folder import read_folder_tokens
from gallama.generation import Engine, State
from tests.engines.exllamav2.asking import Start, spec_for
from tests.engines.exllamav2.ground import Ground, laid_ground, save_folder


@pytest.fixture(scope="module")
def laid() -> Iterator[Ground]:
    with laid_ground() as ground:
        yield ground


@pytest.fixture
def ground(laid: Ground) -> Iterator[Ground]:
    laid.reset()
    yield laid
    assert laid.violations == []


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model that is wrong about one token in four."""
    return save_folder(tmp_path_factory.mktemp("draft"), disagrees_every=4)


@pytest.fixture(scope="module")
def shared_engine(laid: Ground, folder: Path) -> Iterator[Engine]:
    engine = ENGINES["exllamav2"](spec_for(folder), folder)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture
def engine(ground: Ground, shared_engine: Engine) -> Engine:
    """One for all tests of a module; its cache may hold their texts."""
    return shared_engine


@pytest.fixture(scope="session")
def start(folder: Path) -> Start:
    """Grammars at their start."""
    spec = ModelSpec(model_id=str(folder), backend="exllamav2")
    backend = LLGuidanceBackend(read_folder_tokens(folder, spec).vocabulary)

    def start(kind: ConstraintKind, source: object) -> State:
        body = admit_constraints([Constraint(kind=kind, source=source)], None)
        return backend.compile(AnswerSpec(body=body)).start()

    return start
