"""What a model will take of memory, told before it is loaded: an estimate, from its file and its spec.

| Part | Rule |
| --- | --- |
| weights | what stands in the file behind its metadata |
| cache | for each cell, in each layer with keys and values: heads x (key + value length) x bytes a number |
| states | for each sequence, in each other layer: its state in 4 bytes a number |
| compute | see `_compute_bytes`: what is between the layers for one micro-batch, and the logits |
| shelf | finished texts in main memory: as many tokens as the cache has, a quarter where cells are divided |

Numbers take 2 bytes in an FP16 cache, 34/32 in Q8, 26/32 in Q6 and 18/32 in Q4, which have a scale for each
32. What the engines of folders take is by other rules; see `_need_of_exllama`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gallama.catalog.folder_sizes import FolderSizes, read_folder_sizes, stored_bytes
from gallama.catalog.gguf_metadata import GgufMetadata, read_gguf_metadata
from gallama.catalog.lookup import ResolvedModel
from gallama.config import ModelSpec
from gallama.config.model_spec import MAX_TOKENS

PROCESS_BYTES = 100 * 2**20
"""Main memory of a worker beside its models: Python, libraries, the vocabulary."""
TORCH_PROCESS_BYTES = 600 * 2**20
"""The same, of a worker that loads torch."""

EXLLAMA_PROCESS_BYTES = 1200 * 2**20
"""The same, of a worker that loads torch, CUDA and the kernels of exllamav2 or exllamav3."""

_CACHE_BYTES_OF_32: Mapping[str, int] = {"FP16": 64, "Q8": 34, "Q6": 26, "Q4": 18}
# These are llama.cpp's and those of its engine here.
_CELLS_STEP = 256
_IDLE_SEQUENCES = 16
_MOST_DRAFTED_TOKENS = 64
_MOST_SCORED_TOKENS = 32
_MICRO_BATCH_TOKENS = 512
# These are of exllamav2, exllamav3 and their engines here.
_CHUNK_TOKENS = 2048
_FORCED_TOKENS = 15
_MOST_NUMBERS_AT_ONCE = 512 * 2**20
# These are of engines that embed.
_LONGEST_EMBEDDED_TEXT = 8192
_EMBEDDED_TEXTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNeed:
    """What one of the models in a worker takes."""

    weight_bytes: int
    cache_bytes: int
    compute_bytes: int
    shelf_bytes: int
    """Main memory that fills as texts are finished, also where the model is on GPUs."""
    gpu_bytes: int
    """What of this goes onto GPUs, if it may use any."""

    @property
    def total_bytes(self) -> int:
        """Without the shelf."""
        return self.weight_bytes + self.cache_bytes + self.compute_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """What one instance of a model takes."""

    model: ModelNeed
    draft: ModelNeed | None = None
    process_bytes: int = PROCESS_BYTES
    needs_gpus: bool = False
    """Whether what may go onto GPUs can go nowhere else."""

    @property
    def gpu_bytes(self) -> int:
        """Memory of GPUs, if it may use any; without what a process takes on each by itself."""
        return self.model.gpu_bytes + self.draft_gpu_bytes

    @property
    def draft_gpu_bytes(self) -> int:
        """The draft model's part of `gpu_bytes`."""
        return self.draft.gpu_bytes if self.draft else 0

    @property
    def host_bytes(self) -> int:
        """Main memory without a GPU, at the start; what must be on GPUs counts, too."""
        return self.process_bytes + self.model.total_bytes + (self.draft.total_bytes if self.draft else 0)

    @property
    def least_host_bytes(self) -> int:
        """Main memory where no GPU is seen; what must be on one all the same does not count."""
        return self.host_bytes - (self.gpu_bytes if self.needs_gpus else 0)

    @property
    def shelf_bytes(self) -> int:
        """Main memory that is taken in time, as texts are finished."""
        return self.model.shelf_bytes + (self.draft.shelf_bytes if self.draft else 0)


_NOTHING = ModelNeed(weight_bytes=0, cache_bytes=0, compute_bytes=0, shelf_bytes=0, gpu_bytes=0)


def estimate_memory(model: ResolvedModel) -> MemoryNeed:
    """What one instance of the model takes; nothing for an engine that holds no model. Reads its file, or
    its folder.

    Raises:
        InvalidConfig: the file cannot be read, or is no GGUF file of a language model.
    """
    spec = model.spec
    if spec.backend == "scripted":
        return MemoryNeed(model=_NOTHING, process_bytes=0)
    if spec.backend in ("transformers", "embedding"):
        return _need_of_folder(model.path)
    if spec.backend in ("exllamav2", "exllamav3"):
        return _need_with_exllama(spec, model.path)
    metadata = read_gguf_metadata(model.path)
    if spec.model_type == "embedding":
        return MemoryNeed(model=_need_of_embedder(spec, metadata))
    settings = _Settings(spec.backend_extra_args)
    context = _plan_context(spec, settings, metadata)
    need = _need_of(metadata, context, settings, spec.cache_quant or "FP16", settings.gpu_layers)
    if spec.speculation != "draft":
        return MemoryNeed(model=need)
    assert spec.draft_model_id is not None, "the spec has been validated"
    # The draft model's texts share its cells, whatever the model's do.
    cells = spec.draft_cache_size or context.cells
    for_draft = replace(context, cells=cells, cells_of_one=cells, outputs=context.sequences)
    quant = spec.draft_cache_quant or spec.cache_quant or "FP16"
    gpu_layers = settings.gpu_layers if spec.draft_gpus is None else None
    draft = read_gguf_metadata(Path(spec.draft_model_id))
    return MemoryNeed(model=need, draft=_need_of(draft, for_draft, settings, quant, gpu_layers))


def _need_of_embedder(spec: ModelSpec, metadata: GgufMetadata) -> ModelNeed:
    """Of a model that makes vectors: it keeps no text. See `engines/llama_cpp/embedder.py`."""
    longest = spec.max_seq_len or min(metadata.context_length, _LONGEST_EMBEDDED_TEXT)
    if "bert" not in metadata.architecture:  # reads in pieces, and makes a vector of the last token alone
        settings = _Settings(spec.backend_extra_args)
        cells, outputs = longest, _EMBEDDED_TEXTS
    else:  # reads all at once, and has no cache; logits are made room for all the same
        batch_tokens = max(longest, _Settings(spec.backend_extra_args).micro_batch_tokens)
        settings = _Settings({**spec.backend_extra_args, "n_batch": batch_tokens, "n_ubatch": batch_tokens})
        cells, outputs = 0, batch_tokens
    context = _Context(
        cells=_round_up(cells), cells_of_one=longest, sequences=1, outputs=outputs, shelf_tokens=0
    )
    return _need_of(metadata, context, settings, "FP16", settings.gpu_layers)


def _need_of_folder(folder: Path) -> MemoryNeed:
    """Of a model that torch holds: its weights as they are stored. What texts take is not known before."""
    weights = stored_bytes(folder)
    need = ModelNeed(weight_bytes=weights, cache_bytes=0, compute_bytes=0, shelf_bytes=0, gpu_bytes=weights)
    return MemoryNeed(model=need, process_bytes=TORCH_PROCESS_BYTES)


def _need_with_exllama(spec: ModelSpec, folder: Path) -> MemoryNeed:
    sizes = read_folder_sizes(folder)
    length = spec.max_seq_len or min(sizes.context_length, spec.cache_size or sizes.context_length)
    cells = _round_up(max(spec.cache_size or 0, length) + 1 + max(spec.most_draft_tokens, _FORCED_TOKENS))
    bytes_of_32 = _exllama_bytes_of_32(spec)
    need = _need_of_exllama(spec, sizes, cells, bytes_of_32, _gpus_of(spec.gpus))
    draft = None
    if spec.speculation == "draft":
        assert spec.draft_model_id is not None, "the spec has been validated"
        of_draft = read_folder_sizes(Path(spec.draft_model_id))
        gpus = _gpus_of(spec.gpus if spec.draft_gpus is None else spec.draft_gpus)
        if spec.draft_cache_quant is not None:
            bytes_of_32 = _CACHE_BYTES_OF_32[spec.draft_cache_quant]
        draft = _need_of_exllama(spec, of_draft, cells, bytes_of_32, gpus)
    return MemoryNeed(model=need, draft=draft, process_bytes=EXLLAMA_PROCESS_BYTES, needs_gpus=True)


def _exllama_bytes_of_32(spec: ModelSpec) -> int:
    """What 32 numbers of the model's cache take, keys and values taken together."""
    bits = spec.backend_extra_args.get("cache_bits")
    parts = bits.split(",") if isinstance(bits, str) else bits if isinstance(bits, list) else []
    if len(parts) == 2 and all(str(part).strip().isdecimal() for part in parts):
        return 2 * sum(min(int(str(part)), 16) for part in parts) + 2
    return _CACHE_BYTES_OF_32[spec.cache_quant or "FP16"]


def _gpus_of(gigabytes: str | tuple[float, ...]) -> int:
    """How many GPUs are named, at least 1: of `auto` it is not known before they are looked at."""
    return 1 if isinstance(gigabytes, str) else max(1, sum(size > 0 for size in gigabytes))


def _need_of_exllama(
    spec: ModelSpec, sizes: FolderSizes, cells: int, bytes_of_32: int, gpus: int
) -> ModelNeed:
    """Of a model that exllamav2 or exllamav3 holds, which keep the embedding in main memory.

    Nothing of it has been measured: it is what their sources make room for. On each GPU, tensor parallel or
    not, there are the vectors between the layers for one chunk of a prompt, and one weight as plain numbers.
    """
    cache_bytes = math.ceil(cells * sizes.cache_numbers * bytes_of_32 / 32)
    if (
        spec.backend == "exllamav2" and bytes_of_32 != _CACHE_BYTES_OF_32["FP16"]
    ):  # one layer at a time is read as FP16
        cache_bytes += gpus * cells * sizes.widest_cache_numbers * 2
    rows = spec.max_concurrent_requests * (1 + spec.most_draft_tokens)
    compute_bytes = gpus * _chunk_bytes(spec, sizes) + rows * sizes.vocabulary_size * 6
    return ModelNeed(
        weight_bytes=sizes.weight_bytes,
        cache_bytes=cache_bytes,
        compute_bytes=compute_bytes,
        shelf_bytes=0,
        gpu_bytes=sizes.weight_bytes - sizes.embedding_bytes + cache_bytes + compute_bytes,
    )


def _chunk_bytes(spec: ModelSpec, sizes: FolderSizes) -> int:
    chunk_tokens = _whole(spec.backend_extra_args, "max_chunk_size", _CHUNK_TOKENS)
    vectors = 2 * (8 * sizes.hidden_length + 4 * sizes.intermediate_length)
    widest = max(sizes.intermediate_length, sizes.vocabulary_size if spec.backend == "exllamav2" else 0)
    one_weight = min(sizes.hidden_length * widest, _MOST_NUMBERS_AT_ONCE) if sizes.is_quantized else 0
    return chunk_tokens * vectors + 2 * one_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """What the engine will make of a spec; see `engines/llama_cpp/options.py`."""

    cells: int
    cells_of_one: int
    """Those that one token is compared with, at most."""
    sequences: int
    outputs: int
    """Tokens of one batch whose logits may be wanted."""
    shelf_tokens: int
    """Of finished texts, kept beside the cache."""


class _Settings:
    """The engine's own arguments, as far as memory depends on them; what is wrong, the engine tells."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self.micro_batch_tokens = min(
            self._whole("n_ubatch", _MICRO_BATCH_TOKENS), self._whole("n_batch", _MICRO_BATCH_TOKENS)
        )
        self.shelf_tokens = self._whole("shelf_tokens", -1)
        """-1: by rule."""
        gpu_layers = self._whole("n_gpu_layers", -1)
        self.gpu_layers = None if gpu_layers < 0 else gpu_layers
        """None: all."""
        self.keeps_cache_in_main_memory = arguments.get("offload_kqv") is False
        self.has_flash_attention = arguments.get("flash_attn") is not False
        self.shares_cells = arguments.get("kv_unified") is True

    def _whole(self, key: str, default: int) -> int:
        return _whole(self._arguments, key, default)


def _whole(arguments: Mapping[str, Any], key: str, default: int) -> int:
    text = str(arguments.get(key, ""))
    return min(int(text), MAX_TOKENS) if text.isdecimal() else default


def _plan_context(spec: ModelSpec, settings: _Settings, metadata: GgufMetadata) -> _Context:
    slots, trained = spec.max_concurrent_requests, metadata.context_length
    length = _round_up(spec.max_seq_len or min(trained, spec.cache_size or trained))
    cells = max(_round_up(spec.cache_size or 0), length)
    cannot_divide = metadata.has_window or metadata.state_length > 0
    shares_cells = settings.shares_cells or cannot_divide or cells < slots * length
    cells = cells if shares_cells else slots * length
    sequences = slots + _IDLE_SEQUENCES if shares_cells else slots
    shelf_tokens = cells if shares_cells else min(cells, max(2 * length, cells // 4))
    return _Context(
        cells=cells,
        cells_of_one=cells if shares_cells else length,
        sequences=sequences,
        outputs=sequences + _MOST_SCORED_TOKENS + (_MOST_DRAFTED_TOKENS if spec.speculation != "off" else 0),
        shelf_tokens=shelf_tokens if settings.shelf_tokens < 0 else settings.shelf_tokens,
    )


def _need_of(
    metadata: GgufMetadata, context: _Context, settings: _Settings, cache_quant: str, gpu_layers: int | None
) -> ModelNeed:
    layers = len(metadata.head_counts_kv)
    # llama.cpp counts what comes after the layers as one of them.
    part_on_gpus = 1.0 if gpu_layers is None else min(1.0, gpu_layers / (layers + 1))
    cell_bytes = _cell_bytes(metadata, cache_quant)
    cache_bytes = context.cells * cell_bytes + context.sequences * _state_bytes(metadata)
    compute_bytes = _compute_bytes(metadata, context, settings)
    movable = metadata.tensor_bytes + (0 if settings.keeps_cache_in_main_memory else cache_bytes)
    return ModelNeed(
        weight_bytes=metadata.tensor_bytes,
        cache_bytes=cache_bytes,
        compute_bytes=compute_bytes,
        shelf_bytes=context.shelf_tokens * cell_bytes,
        gpu_bytes=math.ceil(movable * part_on_gpus) + compute_bytes if part_on_gpus else 0,
    )


def _cell_bytes(metadata: GgufMetadata, cache_quant: str) -> int:
    heads = sum(metadata.head_counts_kv[layer] for layer in _attention_layers(metadata))
    numbers = heads * (metadata.key_length + metadata.value_length)
    return math.ceil(numbers * _CACHE_BYTES_OF_32[cache_quant] / 32)


def _state_bytes(metadata: GgufMetadata) -> int:
    """Of one sequence. In a model whose layers all have keys and values, all may have a state beside."""
    layers = len(metadata.head_counts_kv)
    without = layers - len(_attention_layers(metadata))
    return 4 * metadata.state_length * (without or layers)


def _attention_layers(metadata: GgufMetadata) -> list[int]:
    interval = metadata.attention_interval
    counts = metadata.head_counts_kv
    return [layer for layer in range(len(counts)) if counts[layer] and (layer + 1) % interval == 0]


def _compute_bytes(metadata: GgufMetadata, context: _Context, settings: _Settings) -> int:
    """What lies between the layers for each token of a micro-batch: some vectors, and what it may look at.

    Without flash attention the scores of each head are kept, too. Seen with llama.cpp: 15.5 MiB for a model
    of 576 numbers a token and 2048 cells, and 6 MiB of logits; this rule makes 23 MiB of it.
    """
    vectors = 4 * (8 * metadata.embedding_length + 2 * metadata.feed_forward_length)
    scores = 2 if settings.has_flash_attention else 4 + 4 * metadata.head_count
    logits = 4 * context.outputs * metadata.vocabulary_size
    return settings.micro_batch_tokens * (vectors + context.cells_of_one * scores) + logits


def _round_up(tokens: int) -> int:
    return -(-tokens // _CELLS_STEP) * _CELLS_STEP
