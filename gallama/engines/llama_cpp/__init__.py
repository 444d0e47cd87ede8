"""Models in GGUF files, through llama-cpp-python's low-level API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from pathlib import Path

from gallama.config import ModelSpec
from gallama.engines import ignore_progress
from gallama.engines.answer_streams import AnswerStreams
from gallama.engines.llama_cpp import bindings
from gallama.engines.llama_cpp.context import SequenceCache
from gallama.engines.llama_cpp.draft_model import load_drafter
from gallama.engines.llama_cpp.loading import load_model
from gallama.engines.llama_cpp.options import (
    LlamaCppOptions,
    choose_context_length,
    choose_cores,
    context_options,
    model_options,
    read_options,
)
from gallama.engines.llama_cpp.scheduler import Scheduler, SchedulerOptions
from gallama.engines.llama_cpp.speculation import Wish
from gallama.generation import EngineStatus, GeneratedChunk, GenerationRequest, ReportProgress


def load(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> LlamaCppEngine:
    """Load a GGUF file and compute a first token with it. Blocks for as long as that takes.

    Raises:
        InvalidConfig: the spec asks for what the model, this build or this engine cannot do.
        ModelLoadFailed: llama.cpp refused the file, or there is too little memory.
    """
    options = read_options(spec)
    return load_model(
        path,
        spec,
        options,
        report_progress,
        lambda model, opened: LlamaCppEngine(model, opened, spec, options),
    )


class LlamaCppEngine:
    """A GGUF model with its scheduler; see `generation.Engine`."""

    def __init__(
        self, model: bindings.NativeModel, opened: ExitStack, spec: ModelSpec, options: LlamaCppOptions
    ) -> None:
        """
        Args:
            opened: takes what is to be closed at the end.
        """
        self._opened = opened
        self._model = model
        self.context_length = choose_context_length(spec, model.trained_context_length)
        self.chat_template = model.chat_template
        self.vocabulary = model.read_vocabulary(spec.eos_token_list or ())
        must_share_cells = model.has_window or not model.can_forget_partly
        for_context = context_options(spec, options, self.context_length, must_share_cells=must_share_cells)
        self._context = bindings.NativeContext(model, for_context)
        opened.callback(self._context.close)
        self._drafter = load_drafter(
            spec,
            target=model,
            vocabulary=self.vocabulary,
            target_options=model_options(spec, options),
            context_options=for_context,
            context_length=self.context_length,
            shelf_tokens=_shelf_tokens(options, for_context),
        )
        if self._drafter is not None:
            opened.callback(self._drafter.close)
        self._streams = AnswerStreams(self.vocabulary)
        self._scheduler = self._new_scheduler(spec, options, for_context)
        self._scheduler.start(self._warm_up)

    def _new_scheduler(
        self, spec: ModelSpec, options: LlamaCppOptions, for_context: bindings.ContextOptions
    ) -> Scheduler:
        cache = SequenceCache(
            self._context,
            sequences=for_context.sequences,
            can_forget_partly=self._model.can_forget_partly,
            has_window=self._model.has_window,
            shelf_tokens=_shelf_tokens(options, for_context),
        )
        scheduler_options = SchedulerOptions(
            slots=spec.max_concurrent_requests,
            batch_tokens=options.n_batch,
            vocabulary_size=self._model.vocabulary_size,
            context_length=self.context_length,
            end_token_ids=self.vocabulary.end_token_ids,
            probe_token_id=self.vocabulary.probe_token_id,
            jump_forward=options.jump_forward,
            step_seconds=options.prompt_step_ms / 1000,
            draft_tokens=spec.most_draft_tokens,
        )
        return Scheduler(
            cache,
            scheduler_options,
            self._streams.hand_over,
            drafter=self._drafter,
            cores=choose_cores(spec, options),
            set_threads=self._set_threads,
        )

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), parse_control_tokens=True)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
        assert 0 < len(request.prompt_token_ids) < self.context_length, "the caller checks the length"
        return self._streams.read(request, self._scheduler.submit, self._scheduler.cancel)

    def status(self) -> EngineStatus:
        return self._scheduler.status()

    async def probe(self) -> None:
        self._streams.refuse_if_closed()
        await asyncio.wrap_future(self._scheduler.probe())

    async def close(self) -> None:
        self._streams.close()
        await asyncio.to_thread(self._scheduler.close)
        self._opened.close()

    def _set_threads(self, threads: int) -> None:
        self._context.set_threads(threads, threads)
        if self._drafter is not None:
            self._drafter.set_threads(threads)

    def _warm_up(self) -> None:
        """Touch all weights once, so that the first request does not wait for the disk."""
        token = self.vocabulary.probe_token_id
        self._context.warm_up(token)
        if self._drafter is not None:
            self._drafter.draft([Wish("warm-up", [token], 1)])
            self._drafter.forget("warm-up")


def _shelf_tokens(options: LlamaCppOptions, for_context: bindings.ContextOptions) -> int:
    """Tokens of finished requests to keep outside of the cache.

    Where each sequence has its own cells, most of what has ended still lies there: less is left for the
    shelf, though two texts of the greatest length find room, or one that is alone in the cache.
    """
    if options.shelf_tokens is not None:
        return options.shelf_tokens
    cells = for_context.cells
    if for_context.shares_cells:
        return cells
    return min(cells, max(2 * cells // for_context.sequences, cells // 4))
