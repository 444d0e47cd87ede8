"""The engine around a library's generator; see `generation.Engine`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from gallama.engines.answer_streams import AnswerStreams
from gallama.engines.generators.thread import Generator, GeneratorThread
from gallama.engines.tokenizer_folder import FolderTokens
from gallama.errors import UnsupportedValue
from gallama.generation import EngineStatus, GeneratedChunk, GenerationRequest


class GeneratorEngine:
    """One loaded model whose library batches and caches by itself."""

    def __init__(self, tokens: FolderTokens, make_generator: Callable[[], Generator], *, name: str) -> None:
        """Load the model. Blocks for as long as that takes.

        Args:
            make_generator: does that; called on the thread on which the model then is computed.
            name: of the backend.

        Raises:
            GallamaError: why it cannot be loaded.
        """
        self.chat_template = tokens.chat_template
        self.vocabulary = tokens.vocabulary
        self._name = name
        self._file = tokens.file
        self._streams = AnswerStreams(self.vocabulary)
        self._thread = GeneratorThread(
            make_generator, self.vocabulary, self._streams.hand_over, name=f"{name}-generator"
        )
        self.context_length = self._thread.start()

    def tokenize(self, text: str) -> list[int]:
        return self._file.tokenize(text)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
        """
        Raises:
            UnsupportedValue: the prompt's log probabilities are wanted, of which the library tells nothing.
        """
        assert 0 < len(request.prompt_token_ids) <= self.context_length, "the caller checks the length"
        if request.prompt_logprobs:
            raise UnsupportedValue(
                f"The {self._name} backend does not tell the log probabilities of prompts; leave out `echo`"
                " or `logprobs`.",
                param="logprobs",
            )
        return self._streams.read(request, self._thread.submit, self._thread.cancel)

    def status(self) -> EngineStatus:
        return self._thread.status()

    async def probe(self) -> None:
        self._streams.refuse_if_closed()
        await asyncio.wrap_future(self._thread.probe())

    async def close(self) -> None:
        self._streams.close()
        await asyncio.to_thread(self._thread.close)
