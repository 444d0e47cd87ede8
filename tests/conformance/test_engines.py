"""What every engine owes its callers. A new engine is one more row of the table."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.config import ModelSpec
from gallama.constraints import AnswerSpec, Compiled, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint, ConstraintKind
from gallama.engines import ENGINES
from gallama.errors import GallamaError, MissingExtra
from gallama.generation import (
    Engine,
    GeneratedChunk,
    GenerationRequest,
    SamplingSettings,
)
from tests.engines.asking import Answer, Observed

SLOTS = 16
CACHE_TOKENS = 8192


Get = Callable[[], Engine]
"""What a test asks for the engine."""
Making = AbstractContextManager[Get]


@contextmanager
def _scripted(request: pytest.FixtureRequest) -> Iterator[Get]:
    """Slow enough that something can be cancelled; it would say much more than any limit here."""
    spec = ModelSpec(
        model_id="any",
        max_concurrent_requests=SLOTS,
        backend_extra_args={"reply": "Grüße, 世界! 😀 " * 1000, "seconds_per_token": 0.0005},
    )
    # It waits on the event loop that it was first used on, and each test has its own.
    yield lambda: ENGINES["scripted"](spec, request.path)


@contextmanager
def _llama_cpp(request: pytest.FixtureRequest) -> Iterator[Get]:
    engine: Engine = request.getfixturevalue("smollm2")
    yield lambda: engine


@contextmanager
def _transformers(request: pytest.FixtureRequest) -> Iterator[Get]:
    """Noise from a model with random weights."""
    pytest.importorskip("transformers")
    from tests.engines.tiny_llama import save_tiny_llama

    with _loaded("transformers", save_tiny_llama(_new_folder(request))) as engine:
        yield lambda: engine


@contextmanager
def _exllamav2(request: pytest.FixtureRequest) -> Iterator[Get]:
    """The library's own generator on a CPU, where a model of arithmetic reads its pages back."""
    pytest.importorskip("torch")
    from tests.engines.exllamav2.ground import laid_ground, save_folder

    with laid_ground() as ground:
        with _loaded("exllamav2", save_folder(_new_folder(request)), cache_size=CACHE_TOKENS) as engine:
            yield lambda: engine
        assert ground.violations == []


@contextmanager
def _exllamav3(request: pytest.FixtureRequest) -> Iterator[Get]:
    """As exllamav2's."""
    pytest.importorskip("torch")
    from tests.engines.exllamav3.ground import save_model, without_gpu

    with without_gpu() as ground:
        with _loaded("exllamav3", save_model(_new_folder(request)), cache_size=CACHE_TOKENS) as engine:
            yield lambda: engine
        assert ground.faults == []


def _on_gpu(backend: str) -> Callable[[pytest.FixtureRequest], Making]:
    """The real library, where there are a GPU and what its extension needs; see docs/gpu_check.md."""

    @contextmanager
    def make(request: pytest.FixtureRequest) -> Iterator[Get]:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU that PyTorch can use")
        from tests.engines.tiny_llama import save_llama_for_gpu

        with ExitStack() as stack:
            folder = save_llama_for_gpu(_new_folder(request))
            try:
                engine = stack.enter_context(_loaded(backend, folder, cache_size=CACHE_TOKENS))
            except MissingExtra as error:
                pytest.skip(str(error))
            yield lambda: engine

    return make


@contextmanager
def _loaded(backend: str, folder: Path, **settings: Any) -> Iterator[Engine]:
    spec = ModelSpec.model_validate(
        {"model_id": str(folder), "backend": backend, "max_concurrent_requests": SLOTS, **settings}
    )
    engine = ENGINES[backend](spec, folder)
    yield engine
    asyncio.run(engine.close())


def _new_folder(request: pytest.FixtureRequest) -> Path:
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    return factory.mktemp("model")


MAKERS: dict[str, Callable[[pytest.FixtureRequest], Making]] = {
    "scripted": _scripted,
    "llama_cpp": _llama_cpp,
    "transformers": _transformers,
    "exllamav2": _exllamav2,
    "exllamav3": _exllamav3,
}
MAKERS_ON_GPU = {f"{backend}_on_gpu": _on_gpu(backend) for backend in ("exllamav2", "exllamav3")}


# All tests of an engine come one after the other: a library that is made to run without a GPU changes torch.
@pytest.fixture(
    scope="module",
    params=[*MAKERS, *(pytest.param(name, marks=pytest.mark.needs_gpu) for name in MAKERS_ON_GPU)],
)
def get_engine(request: pytest.FixtureRequest) -> Iterator[Get]:
    with (MAKERS | MAKERS_ON_GPU)[request.param](request) as get:
        yield get


@pytest.fixture
def engine(get_engine: Get) -> Engine:
    return get_engine()


@pytest.fixture(scope="module")
def backends() -> dict[str, LLGuidanceBackend]:
    """By vocabulary: reading a large one takes a while."""
    return {}


@pytest.fixture
def backend(engine: Engine, backends: dict[str, LLGuidanceBackend]) -> LLGuidanceBackend:
    vocabulary = engine.vocabulary
    if vocabulary.fingerprint not in backends:
        backends[vocabulary.fingerprint] = LLGuidanceBackend(vocabulary)
    return backends[vocabulary.fingerprint]


class Failing(Observed):
    """A grammar whose mask cannot be computed."""

    def mask(self, out: NDArray[np.int32]) -> bool:
        raise RuntimeError("a bug")


def compiled(backend: LLGuidanceBackend, kind: ConstraintKind, source: object) -> Compiled:
    body = admit_constraints([Constraint(kind=kind, source=source)], None)
    return backend.compile(AnswerSpec(body=body))


def request_for(engine: Engine, prompt: str = "Hello!", **fields: Any) -> GenerationRequest:
    fields.setdefault("max_tokens", 12)
    fields.setdefault("sampling", SamplingSettings(temperature=1))
    return GenerationRequest(prompt_token_ids=engine.tokenize(prompt), **fields)


async def generate(engine: Engine, prompt: str = "Hello!", **fields: Any) -> Answer:
    async with aclosing(engine.generate(request_for(engine, prompt, **fields))) as chunks:
        return Answer([chunk async for chunk in chunks])


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(30):
        while (status := engine.status()).busy_slots or status.waiting:  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.001)


async def until_text(chunks: AsyncGenerator[GeneratedChunk, None]) -> None:
    async for chunk in chunks:
        if chunk.sampled_tokens:
            return


def test_the_vocabulary_is_sound(engine: Engine) -> None:
    vocabulary = engine.vocabulary
    assert vocabulary.end_token_id in vocabulary.end_token_ids
    assert not any(vocabulary.tokens[token] for token in vocabulary.end_token_ids)
    assert not any(vocabulary.tokens[token] for token in vocabulary.control_tokens.values())
    for text in ("Grüße, 世界! 😀", " leading", "a\n\nb", "\x00"):
        token_ids = vocabulary.encode(text.encode())
        assert b"".join(vocabulary.tokens[token] for token in token_ids).decode() == text


def test_a_prompt_s_control_tokens_are_recognised_and_a_text_s_are_not(engine: Engine) -> None:
    name, token = next(iter(engine.vocabulary.control_tokens.items()))
    assert engine.tokenize(f"a{name}b").count(token) == 1
    assert token not in engine.vocabulary.encode(f"a{name}b".encode())


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
async def test_no_answer_has_more_tokens_than_its_limit(engine: Engine, max_tokens: int) -> None:
    answer = await generate(engine, max_tokens=max_tokens)
    assert answer.tokens <= max_tokens
    assert (answer.end == "length") == (answer.tokens == max_tokens)


@pytest.mark.parametrize("max_tokens", [1, 5, 17, 60])
async def test_a_limit_may_cut_a_grammar_at_any_token(
    engine: Engine, backend: LLGuidanceBackend, max_tokens: int
) -> None:
    state = compiled(backend, "regex", "(long ){10}[0-9]{30}").start()
    answer = await generate(engine, max_tokens=max_tokens, state=state)
    assert answer.tokens <= max_tokens
    assert (answer.end == "length") == (answer.tokens == max_tokens)


@pytest.mark.parametrize(
    "pattern", ["(yes|no)", "[a-z]{3}-[0-9]{4}", "[à-ü]{4}", "[一-龥]{3}😀", "(a|aa|aaa)b?", ""]
)
async def test_a_grammar_is_obeyed_to_its_end(
    engine: Engine, backend: LLGuidanceBackend, pattern: str
) -> None:
    grammar = compiled(backend, "regex", pattern)
    for temperature in (0, 1, 2):
        state = Observed(grammar.start())
        answer = await generate(
            engine, max_tokens=100, state=state, sampling=SamplingSettings(temperature=temperature)
        )
        assert answer.end == "stop"
        assert re.fullmatch(pattern, answer.text), answer.text
        assert b"".join(engine.vocabulary.tokens[token] for token in state.taken).decode() == answer.text


async def test_tokens_are_counted_once_as_sampled_or_forced(
    engine: Engine, backend: LLGuidanceBackend
) -> None:
    state = Observed(
        compiled(backend, "choice", ["one fixed beginning: a", "one fixed beginning: b"]).start()
    )
    answer = await generate(engine, max_tokens=100, state=state)
    assert answer.tokens == len(state.taken)
    assert sum(chunk.sampled_tokens for chunk in answer.chunks) >= 1


async def test_the_last_chunk_and_only_it_says_why_the_answer_ended(
    engine: Engine, backend: LLGuidanceBackend
) -> None:
    for answer in (
        await generate(engine),
        await generate(engine, max_tokens=50, state=compiled(backend, "choice", ["short"]).start()),
    ):
        assert all(chunk.end is None for chunk in answer.chunks[:-1])
        assert answer.end in ("stop", "length")


async def test_no_chunk_cuts_a_character(engine: Engine, backend: LLGuidanceBackend) -> None:
    state = compiled(backend, "regex", "([à-ü]|[一-龥]|[😀-😎]){12}").start()
    answer = await generate(engine, max_tokens=100, state=state)
    assert len(answer.text) == 12
    assert not any("\ufffd" in chunk.text for chunk in answer.chunks)


async def test_log_probabilities_come_for_every_token(engine: Engine) -> None:
    answer = await generate(engine, logprobs=3)
    entries = [entry for chunk in answer.chunks for entry in chunk.logprobs]
    assert len(entries) == answer.tokens
    for entry in entries:
        values = [value for _, value in entry.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= 0


async def test_without_asking_there_are_no_log_probabilities(engine: Engine) -> None:
    assert not any(chunk.logprobs for chunk in (await generate(engine)).chunks)


async def test_closing_frees_the_slot(engine: Engine, backend: LLGuidanceBackend) -> None:
    state = compiled(backend, "regex", "[a-z]{500}").start()
    chunks = engine.generate(request_for(engine, max_tokens=1000, state=state))
    await until_text(chunks)
    assert engine.status().busy_slots == 1
    await chunks.aclose()
    await until_idle(engine)


async def test_cancelling_at_any_moment_frees_the_slot(engine: Engine) -> None:
    rng = random.Random(0)
    tasks = [asyncio.create_task(generate(engine, f"Prompt {n}", max_tokens=500)) for n in range(SLOTS + 4)]
    for task in tasks:
        await asyncio.sleep(rng.random() * 0.02)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until_idle(engine)


async def test_many_at_once_are_all_answered(engine: Engine, backend: LLGuidanceBackend) -> None:
    """More than there are slots."""
    grammar = compiled(backend, "regex", "[a-z]{5}")
    answers = await asyncio.gather(
        *(generate(engine, f"Prompt {n}", max_tokens=20, state=grammar.start()) for n in range(SLOTS + 4))
    )
    assert all(re.fullmatch("[a-z]{5}", answer.text) for answer in answers)
    await until_idle(engine)


async def test_an_answer_that_breaks_leaves_the_others_alone(
    engine: Engine, backend: LLGuidanceBackend, caplog: pytest.LogCaptureFixture
) -> None:
    grammar = compiled(backend, "regex", "[a-z]{20}")
    others = [asyncio.create_task(generate(engine, max_tokens=60, state=grammar.start())) for _ in range(2)]
    with pytest.raises((GallamaError, RuntimeError)):
        await generate(engine, state=Failing(grammar.start()))
    assert all(len(answer.text) == 20 for answer in await asyncio.gather(*others))
    await until_idle(engine)
