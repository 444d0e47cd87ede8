"""Models in GGUF files, through llama-cpp-python's low-level API."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from gallama.config import ModelSpec
from gallama.engines.llama_cpp import bindings
from gallama.engines.llama_cpp.context import SequenceCache
from gallama.engines.llama_cpp.scheduler import (
    Ended,
    Job,
    Scheduler,
    SchedulerOptions,
    Started,
    TokensAdded,
    Update,
)
from gallama.errors import GallamaError, InvalidConfig, WorkerUnavailable
from gallama.generation import EngineStatus, GeneratedChunk, GenerationRequest

# Sequences kept in the cache beside those of the busy slots.
_IDLE_SEQUENCES = 16
_CELLS_STEP = 256


class LlamaCppOptions(BaseModel, extra="forbid", frozen=True):
    """The keys of `backend_extra_args`."""

    n_batch: int = Field(512, ge=32, le=65536)
    n_ubatch: int = Field(512, ge=32, le=65536)
    n_threads: int | None = Field(None, ge=1, le=1024)
    n_threads_batch: int | None = Field(None, ge=1, le=1024)
    n_gpu_layers: int = Field(-1, ge=-1)
    offload_kqv: bool = True
    flash_attn: bool | None = None
    use_mmap: bool = True
    use_mlock: bool = False
    rope_freq_base: float = Field(0.0, ge=0.0)
    rope_freq_scale: float = Field(0.0, ge=0.0)


def load(spec: ModelSpec, path: Path) -> LlamaCppEngine:
    """Load a GGUF file and compute a first token with it. Blocks for as long as that takes.

    Raises:
        InvalidConfig: the spec asks for what the model, this build or this engine cannot do.
        ModelLoadFailed: llama.cpp refused the file, or there is too little memory.
    """
    options = _read_options(spec)
    _check_slots(spec, options)
    bindings.initialize()
    model = bindings.NativeModel(path, _model_options(spec, options))
    context_length = _context_length(spec, model)
    cells = _round_up(spec.cache_size or context_length)
    slots = spec.max_concurrent_requests
    context = bindings.NativeContext(
        model, _context_options(spec, options, cells=max(cells, _round_up(context_length)), slots=slots)
    )
    return LlamaCppEngine(
        model, context, spec=spec, slots=slots, context_length=context_length, batch_tokens=options.n_batch
    )


class LlamaCppEngine:
    """A GGUF model with its scheduler; see `generation.Engine`."""

    def __init__(
        self,
        model: bindings.NativeModel,
        context: bindings.NativeContext,
        *,
        spec: ModelSpec,
        slots: int,
        context_length: int,
        batch_tokens: int,
    ) -> None:
        self._model = model
        self._context = context
        self.context_length = context_length
        self.chat_template = model.chat_template
        self.vocabulary = model.read_vocabulary(spec.eos_token_list or ())
        self._names = {token_id: name for name, token_id in self.vocabulary.control_tokens.items()}
        cache = SequenceCache(
            context, sequences=slots + _IDLE_SEQUENCES, can_forget_partly=model.can_forget_partly
        )
        options = SchedulerOptions(
            slots=slots,
            batch_tokens=batch_tokens,
            vocabulary_size=model.vocabulary_size,
            context_length=context_length,
            end_token_ids=self.vocabulary.end_token_ids,
        )
        self._queues: dict[Job, asyncio.Queue[Update]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closing = False
        self._scheduler = Scheduler(cache, options, self._hand_over)
        self._warm_up()
        self._scheduler.start()

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), parse_control_tokens=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedChunk, None]:
        assert 0 < len(request.prompt_token_ids) < self.context_length, "the caller checks the length"
        if self._is_closing:
            raise WorkerUnavailable("The model is being unloaded.")
        self._loop = asyncio.get_running_loop()
        job = Job(request)
        updates = self._queues[job] = asyncio.Queue()
        text = _TextAssembler(self.vocabulary.tokens, self._visible_names(request))
        self._scheduler.submit(job)
        try:
            while True:
                update = await updates.get()
                match update:
                    case GallamaError():
                        raise update
                    case Started():
                        yield GeneratedChunk(cached_prompt_tokens=update.cached_prompt_tokens)
                    case TokensAdded():
                        for chunk in text.chunks(update):
                            yield chunk
                    case Ended():
                        yield GeneratedChunk(text=text.rest(), end=update.reason)
                        return
        finally:
            self._scheduler.cancel(job)
            del self._queues[job]

    def status(self) -> EngineStatus:
        return self._scheduler.status()

    async def close(self) -> None:
        self._is_closing = True
        await asyncio.to_thread(self._scheduler.close)
        self._context.close()
        self._model.close()

    def _visible_names(self, request: GenerationRequest) -> dict[int, str]:
        return {token: self._names[token] for token in request.visible_control_tokens}

    def _hand_over(self, updates: Sequence[tuple[Job, Update]]) -> None:
        """Called by the scheduler's thread: one wake-up of the event loop for all jobs of a step."""
        assert self._loop is not None, "a job was submitted from a loop"
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._distribute, updates)

    def _distribute(self, updates: Sequence[tuple[Job, Update]]) -> None:
        for job, update in updates:
            if job in self._queues:  # else its reader has left
                self._queues[job].put_nowait(update)

    def _warm_up(self) -> None:
        """Touch all weights once, so that the first request does not wait for the disk."""
        start = self.vocabulary.start_token_id
        token = self.vocabulary.end_token_id if start is None else start
        self._context.warm_up(token)


class _TextAssembler:
    """Token ids to text that is never cut inside a character."""

    def __init__(self, tokens: Sequence[bytes], visible_names: dict[int, str]) -> None:
        self._tokens = tokens
        self._visible_names = visible_names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def chunks(self, added: TokensAdded) -> Iterator[GeneratedChunk]:
        """The added tokens as chunks; a visible control token is one of its own."""
        text, count = "", 0
        for token_id in added.token_ids:
            if token_id in self._visible_names:
                yield from self._text_chunk(text + self.rest(), count, added)
                yield self._control_chunk(token_id, added)
                text, count = "", 0
            else:
                text += self._decoder.decode(self._tokens[token_id])
                count += 1
        yield from self._text_chunk(text, count, added)

    def rest(self) -> str:
        """What is left of a character that will not be finished."""
        return self._decoder.decode(b"", final=True)

    def _text_chunk(self, text: str, count: int, added: TokensAdded) -> Iterator[GeneratedChunk]:
        if count or text:
            yield GeneratedChunk(
                text=text,
                logprobs=added.logprobs if count else (),
                sampled_tokens=0 if added.were_forced else count,
                forced_tokens=count if added.were_forced else 0,
            )

    def _control_chunk(self, token_id: int, added: TokensAdded) -> GeneratedChunk:
        return GeneratedChunk(
            control_token=self._visible_names[token_id],
            logprobs=added.logprobs,
            sampled_tokens=int(not added.were_forced),
            forced_tokens=int(added.were_forced),
        )


def _read_options(spec: ModelSpec) -> LlamaCppOptions:
    try:
        return LlamaCppOptions.model_validate(dict(spec.backend_extra_args))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        valid = ", ".join(LlamaCppOptions.model_fields)
        raise InvalidConfig(
            f"`backend_extra_args.{key}`: {first['msg']}. The llama_cpp backend takes: {valid}."
        ) from error


def _check_slots(spec: ModelSpec, options: LlamaCppOptions) -> None:
    slots = spec.max_concurrent_requests
    if slots + _IDLE_SEQUENCES > bindings.max_sequences():
        raise InvalidConfig(
            f"`max_concurrent_requests` is {slots}; the llama_cpp backend takes at most"
            f" {bindings.max_sequences() - _IDLE_SEQUENCES}."
        )
    if slots > options.n_batch:
        raise InvalidConfig(
            f"`backend_extra_args.n_batch` is {options.n_batch}, but a batch must hold a token of each"
            f" request, and `max_concurrent_requests` is {slots}."
        )


def _model_options(spec: ModelSpec, options: LlamaCppOptions) -> bindings.ModelOptions:
    gigabytes = () if isinstance(spec.gpus, str) else spec.gpus
    if (any(gigabytes) or options.n_gpu_layers > 0) and not bindings.supports_gpus():
        raise InvalidConfig(
            "`gpus` or `n_gpu_layers` asks for a GPU, but this build of llama.cpp has no GPU support. Install"
            " llama-cpp-python built for your GPU, or leave both out to run on the CPU."
        )
    if len(gigabytes) > bindings.max_gpus():
        raise InvalidConfig(
            f"`gpus` names {len(gigabytes)} GPUs; llama.cpp takes at most {bindings.max_gpus()}."
        )
    hides_all_gpus = bool(gigabytes) and not any(gigabytes)
    return bindings.ModelOptions(
        gpu_layers=0 if hides_all_gpus else options.n_gpu_layers,
        gpu_split=gigabytes,
        use_mmap=options.use_mmap,
        use_mlock=options.use_mlock,
    )


def _context_options(
    spec: ModelSpec, options: LlamaCppOptions, *, cells: int, slots: int
) -> bindings.ContextOptions:
    threads = options.n_threads or usable_cores()
    cache_quant = spec.cache_quant or "FP16"
    if cache_quant not in bindings.CACHE_TYPES:
        raise InvalidConfig(
            f"`cache_quant` is {cache_quant}; llama.cpp has {', '.join(bindings.CACHE_TYPES)}."
        )
    if options.flash_attn is False and cache_quant != "FP16":
        raise InvalidConfig(
            f"`cache_quant` is {cache_quant}, which needs flash attention; leave `flash_attn` out."
        )
    return bindings.ContextOptions(
        cells=cells,
        sequences=slots + _IDLE_SEQUENCES,
        batch_tokens=options.n_batch,
        micro_batch_tokens=min(options.n_ubatch, options.n_batch),
        threads=threads,
        batch_threads=options.n_threads_batch or threads,
        cache_type=bindings.CACHE_TYPES[cache_quant],
        flash_attention=options.flash_attn,
        offload_kv=options.offload_kqv,
        rope_freq_base=options.rope_freq_base,
        rope_freq_scale=options.rope_freq_scale,
    )


def _context_length(spec: ModelSpec, model: bindings.NativeModel) -> int:
    """The longest sequence: what the spec says, else what the model was trained for and the cache holds."""
    if spec.max_seq_len is None:
        return min(model.trained_context_length, spec.cache_size or model.trained_context_length)
    return spec.max_seq_len


def usable_cores() -> int:
    """Processor cores that this process may use; llama.cpp collapses when its threads share one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, _cgroup_cores()))


def _cgroup_cores() -> int:
    """The quota of a container, in whole cores; as good as none where it has no limit."""
    unlimited = 1 << 16
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return unlimited if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return unlimited


def _round_up(tokens: int) -> int:
    return -(-tokens // _CELLS_STEP) * _CELLS_STEP
