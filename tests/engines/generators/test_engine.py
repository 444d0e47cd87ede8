"""The engine around a library's generator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from gallama.engines.generators.engine import GeneratorEngine
from gallama.engines.generators.text import Text
from gallama.engines.tokenizer_file import TokenizerFile
from gallama.engines.tokenizer_folder import FolderTokens
from gallama.errors import UnsupportedValue, WorkerUnavailable
from gallama.generation import GenerationRequest, SamplingSettings, Vocabulary
from tests.engines.tiny_tokenizer import train_tiny_tokenizer


class Echo:
    """Writes the letter that a prompt ends with again and again, one text at a time."""

    slots = 1
    context_length = 50

    def __init__(self) -> None:
        self._text: Text | None = None

    def start(self, text: Text) -> bool:
        if self._text is not None:
            return False
        self._text = text
        text.leg = object()
        text.begin(0)
        return True

    def cancel(self, text: Text) -> None:
        self._text = None

    def step(self) -> None:
        assert self._text is not None
        self._text.take(self._text.token_ids[-1])

    def rebuild(self) -> None:
        self._text = None

    def probe(self) -> None:
        pass

    def cached_tokens(self) -> int:
        return 0

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def file() -> TokenizerFile:
    return TokenizerFile(train_tiny_tokenizer())


@pytest.fixture
def new_engine(byte_vocabulary: Vocabulary, file: TokenizerFile) -> Callable[[], GeneratorEngine]:
    def make() -> GeneratorEngine:
        tokens = FolderTokens(file, byte_vocabulary, "{{ messages }}")
        return GeneratorEngine(tokens, Echo, name="echo")

    return make


def asking(prompt: bytes, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt_token_ids=list(prompt), sampling=SamplingSettings(), **{"max_tokens": 5, **fields}
    )


async def text_of(engine: GeneratorEngine, request: GenerationRequest) -> str:
    async with aclosing(engine.generate(request)) as chunks:
        return "".join([chunk.text async for chunk in chunks])


async def test_it_tells_of_its_model_and_writes(new_engine: Callable[[], GeneratorEngine]) -> None:
    engine = new_engine()
    assert (engine.context_length, engine.chat_template) == (50, "{{ messages }}")
    assert await text_of(engine, asking(b"ab")) == "bbbbb"
    await engine.close()


async def test_a_prompt_is_tokenized_by_the_folders_tokenizer(
    new_engine: Callable[[], GeneratorEngine], file: TokenizerFile
) -> None:
    engine = new_engine()
    assert engine.tokenize("The old bridge") == file.tokenize("The old bridge")
    await engine.close()


async def test_log_probabilities_of_a_prompt_are_refused_before_anything_is_computed(
    new_engine: Callable[[], GeneratorEngine],
) -> None:
    engine = new_engine()
    with pytest.raises(UnsupportedValue, match="leave out `echo` or `logprobs`") as refused:
        engine.generate(asking(b"ab", logprobs=0, prompt_logprobs=True))
    assert refused.value.param == "logprobs"
    assert engine.status().steps == 0
    await engine.close()


async def test_once_closed_it_takes_nothing_more(new_engine: Callable[[], GeneratorEngine]) -> None:
    engine = new_engine()
    await engine.probe()
    await engine.close()
    with pytest.raises(WorkerUnavailable):
        await text_of(engine, asking(b"ab"))
    with pytest.raises(WorkerUnavailable):
        await engine.probe()
