"""From a model's spec to llama.cpp's parameters; what they cannot express is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from gallama.config import ModelSpec
from gallama.config.config_file import default_config_path
from gallama.engines.extra_arguments import read_extra_arguments
from gallama.engines.llama_cpp import bindings
from gallama.engines.llama_cpp.scheduler import MOST_DRAFTED_TOKENS, MOST_SCORED_TOKENS
from gallama.engines.processor_cores import Cores, OwnCores, cores_to_share, usable_cores
from gallama.errors import InvalidConfig

# Sequences kept in the cache beside those of the busy slots, where all share its cells.
IDLE_SEQUENCES = 16
_CELLS_STEP = 256


class NativeOptions(BaseModel, extra="forbid", frozen=True):
    """The keys of `backend_extra_args` that llama.cpp has for any model."""

    n_batch: int = Field(512, ge=32, le=65536)
    n_threads: int | None = Field(None, ge=1, le=1024)
    n_threads_batch: int | None = Field(None, ge=1, le=1024)
    n_gpu_layers: int = Field(-1, ge=-1)
    offload_kqv: bool = True
    flash_attn: bool | None = None
    use_mmap: bool = True
    use_mlock: bool = False
    rope_freq_base: float = Field(0.0, ge=0.0)
    rope_freq_scale: float = Field(0.0, ge=0.0)


class LlamaCppOptions(NativeOptions, extra="forbid", frozen=True):
    """The keys for a model that writes."""

    n_ubatch: int = Field(512, ge=32, le=65536)
    jump_forward: bool = True
    kv_unified: bool | None = None
    shelf_tokens: int | None = Field(None, ge=0, le=2**30)
    prompt_step_ms: int = Field(200, ge=1, le=60_000)


class EmbedderOptions(NativeOptions, extra="forbid", frozen=True):
    """The keys for a model that embeds."""

    pooling: Literal["mean", "cls", "last", "rank"] | None = None
    matryoshka_dimensions: Literal["any"] | tuple[Annotated[int, Field(ge=1)], ...] = ()


def read_options(spec: ModelSpec) -> LlamaCppOptions:
    """The spec's `backend_extra_args`.

    Raises:
        InvalidConfig: an unknown key, or a value that cannot be.
    """
    options = read_extra_arguments(LlamaCppOptions, spec, backend="llama_cpp")
    _check_slots(spec, options)
    return options


def _check_slots(spec: ModelSpec, options: LlamaCppOptions) -> None:
    slots = spec.max_concurrent_requests
    if slots + IDLE_SEQUENCES > bindings.max_sequences():
        raise InvalidConfig(
            f"`max_concurrent_requests` is {slots}; the llama_cpp backend takes at most"
            f" {bindings.max_sequences() - IDLE_SEQUENCES}."
        )
    if slots > options.n_batch:
        raise InvalidConfig(
            f"`backend_extra_args.n_batch` is {options.n_batch}, but a batch must hold a token of each"
            f" request, and `max_concurrent_requests` is {slots}."
        )


def model_options(spec: ModelSpec, options: NativeOptions) -> bindings.ModelOptions:
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
    if hides_all_gpus and options.n_gpu_layers > 0:
        raise InvalidConfig("`gpus` hides every GPU, but `n_gpu_layers` puts layers on one; leave one out.")
    return bindings.ModelOptions(
        gpu_layers=0 if hides_all_gpus else options.n_gpu_layers,
        gpu_split=gigabytes,
        use_mmap=options.use_mmap,
        use_mlock=options.use_mlock,
        cache_folder=_cache_folder(),
    )


def context_options(
    spec: ModelSpec, options: LlamaCppOptions, context_length: int, *, must_share_cells: bool = False
) -> bindings.ContextOptions:
    """
    Args:
        must_share_cells: the model's cache cannot be divided among the slots.

    Raises:
        InvalidConfig: the cache cannot be had as the spec asks for it.
    """
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
    slots = spec.max_concurrent_requests
    cells = _round_up(max(spec.cache_size or 0, context_length))
    shares_cells = _shares_cells(spec, options, cells, context_length, must_share=must_share_cells)
    sequences = slots + IDLE_SEQUENCES if shares_cells else slots
    return bindings.ContextOptions(
        cells=cells if shares_cells else slots * _round_up(context_length),
        sequences=sequences,
        shares_cells=shares_cells,
        outputs=sequences + MOST_SCORED_TOKENS + (MOST_DRAFTED_TOKENS if spec.speculation != "off" else 0),
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


def embedder_context_options(
    options: EmbedderOptions,
    *,
    batch_tokens: int,
    cells: int | None = None,
    sequences: int = 1,
    outputs: int | None = None,
    pooling: str | None = None,
) -> bindings.ContextOptions:
    """A context that reads whole texts, and makes vectors of them if `pooling` says how.

    Args:
        cells: as many as `batch_tokens` by default.
        outputs: tokens of one batch that are computed to the end; all by default.
    """
    threads = options.n_threads or usable_cores()
    return bindings.ContextOptions(
        cells=_round_up(batch_tokens if cells is None else cells),
        sequences=sequences,
        outputs=batch_tokens if outputs is None else outputs,
        batch_tokens=batch_tokens,
        # The tokens of a text must not be torn apart.
        micro_batch_tokens=batch_tokens,
        threads=threads,
        batch_threads=options.n_threads_batch or threads,
        cache_type=bindings.CACHE_TYPES["FP16"],
        flash_attention=options.flash_attn,
        offload_kv=options.offload_kqv,
        rope_freq_base=options.rope_freq_base,
        rope_freq_scale=options.rope_freq_scale,
        pooling=pooling,
    )


def _shares_cells(
    spec: ModelSpec, options: LlamaCppOptions, cells: int, context_length: int, *, must_share: bool
) -> bool:
    """Whether the slots share the cache's cells; where it has enough for all, each has its own.

    A step is shorter so: no token is compared with the cells of others. docs/decisions/0015 has the figures.
    """
    slots = spec.max_concurrent_requests
    needed = slots * _round_up(context_length)
    if options.kv_unified is None:
        return must_share or cells < needed
    if options.kv_unified:
        return True
    if must_share:
        raise InvalidConfig(
            "`backend_extra_args.kv_unified` is false, but this model's cache cannot be divided."
        )
    if cells < needed:
        raise InvalidConfig(
            f"`backend_extra_args.kv_unified` is false, but a part for each of {slots} requests"
            f" (`max_concurrent_requests`) of {context_length} tokens (`max_seq_len`) needs a `cache_size` of"
            f" {needed}."
        )
    return False


def choose_cores(spec: ModelSpec, options: NativeOptions) -> Cores:
    """The cores to compute on: as many as the spec says, else what there is, shared with other workers.

    A model that is on a GPU as a whole leaves little to compute on cores, so it takes no part in sharing.
    """
    if options.n_threads is not None or options.n_threads_batch is not None:
        return OwnCores(options.n_threads or usable_cores())
    if bindings.supports_gpus() and model_options(spec, options).gpu_layers < 0:
        return OwnCores(usable_cores())
    return cores_to_share()


def choose_context_length(spec: ModelSpec, trained_context_length: int) -> int:
    """The longest sequence: what the spec says, else what the model was trained for and the cache holds."""
    return spec.max_seq_len or min(trained_context_length, spec.cache_size or trained_context_length)


def _cache_folder() -> Path | None:
    """Where vocabularies are kept: beside the config file; None for a user without a home."""
    try:
        return default_config_path(os.environ).parent / "cache" / "vocabularies"
    except RuntimeError:
        return None


def _round_up(tokens: int) -> int:
    return -(-tokens // _CELLS_STEP) * _CELLS_STEP
