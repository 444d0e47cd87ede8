"""Models in folders as Hugging Face has them, through transformers and PyTorch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

# Read once, when the libraries are imported: no model, code or kernel is ever fetched.
os.environ["HF_HUB_OFFLINE"] = "1"

from gallama.config import ModelSpec
from gallama.engines import ignore_progress
from gallama.engines.answer_streams import AnswerStreams
from gallama.engines.tokenizer_folder import FolderTokens
from gallama.engines.transformers.computation import CausalModel
from gallama.engines.transformers.loading import (
    free_memory,
    load_config,
    load_tokens,
    load_weights,
    longest_text,
    naming,
)
from gallama.engines.transformers.options import (
    TransformersOptions,
    choose_context_length,
    choose_cores,
    read_options,
)
from gallama.engines.transformers.scheduler import Scheduler, SchedulerOptions
from gallama.generation import EngineStatus, GeneratedChunk, GenerationRequest, ReportProgress

# Beside the weights there are a tokenizer to read and a first token to compute.
_PART_OF_WEIGHTS = 0.95


def load(
    spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress
) -> TransformersEngine:
    """Load a folder and compute a first token with it. Blocks for as long as that takes.

    Raises:
        InvalidConfig: the spec asks for what the model or this engine cannot do.
        MissingExtra: the model needs a library that is not there.
        ModelLoadFailed: the folder holds no model that this engine runs.
        NotEnoughMemory: it does not fit the GPUs, or they have no room left to compute a token.
    """
    options = read_options(spec)
    config = load_config(path, options)
    tokens = load_tokens(path, config, spec, options)
    length = choose_context_length(spec, longest_text(config, spec))
    model = load_weights(
        path, config, spec, options, lambda fraction: report_progress(_PART_OF_WEIGHTS * fraction)
    )
    with naming(path):
        return TransformersEngine(model, tokens, spec, options, context_length=length)


class TransformersEngine:
    """A model with its scheduler; see `generation.Engine`."""

    def __init__(
        self,
        model: Any,
        tokens: FolderTokens,
        spec: ModelSpec,
        options: TransformersOptions,
        *,
        context_length: int,
    ) -> None:
        self.context_length = context_length
        self.chat_template = tokens.chat_template
        self.vocabulary = tokens.vocabulary
        self._tokens = tokens
        self._streams = AnswerStreams(self.vocabulary)
        self._model = CausalModel(model, vocabulary_size=len(self.vocabulary.tokens))
        self._scheduler = Scheduler(
            self._model,
            self._scheduler_options(spec, options),
            self._streams.hand_over,
            cores=choose_cores(options, is_on_cpu=self._model.logits_device.type == "cpu"),
        )
        self._scheduler.start()

    def _scheduler_options(self, spec: ModelSpec, options: TransformersOptions) -> SchedulerOptions:
        vocabulary = self.vocabulary
        return SchedulerOptions(
            slots=spec.max_concurrent_requests,
            batch_tokens=options.n_batch,
            cache_tokens=max(spec.cache_size or 0, self.context_length),
            vocabulary_size=len(vocabulary.tokens),
            unused_token_ids=vocabulary.unused_token_ids(),
            end_token_ids=vocabulary.end_token_ids,
            probe_token_id=vocabulary.probe_token_id,
            step_seconds=options.prompt_step_ms / 1000,
        )

    def tokenize(self, text: str) -> list[int]:
        return self._tokens.file.tokenize(text)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
        assert 0 < len(request.prompt_token_ids) <= self.context_length, "the caller checks the length"
        return self._streams.read(request, self._scheduler.submit, self._scheduler.cancel)

    def status(self) -> EngineStatus:
        return self._scheduler.status()

    async def probe(self) -> None:
        self._streams.refuse_if_closed()
        await asyncio.wrap_future(self._scheduler.probe())

    async def close(self) -> None:
        self._streams.close()
        await asyncio.to_thread(self._scheduler.close)
        self._model.close()
        free_memory()
