"""The only code that touches llama.cpp's C API: models, contexts, batches, sampler chains as objects.

Everything here is thin: sizes, pointers and return codes in, arrays and errors out. Decisions are made
elsewhere. A `NativeContext` belongs to one thread; a `NativeModel` may be shared.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

import gallama
from gallama.engines.llama_cpp.vocabulary_cache import VocabularyTables, cached_tables
from gallama.errors import InvalidConfig, ModelLoadFailed
from gallama.generation import InfillTokens, Vocabulary

logger = logging.getLogger(__name__)

POOLINGS = {
    "mean": lib.LLAMA_POOLING_TYPE_MEAN,
    "cls": lib.LLAMA_POOLING_TYPE_CLS,
    "last": lib.LLAMA_POOLING_TYPE_LAST,
    "rank": lib.LLAMA_POOLING_TYPE_RANK,
}
"""How the vectors of a text's tokens become one of the text: their mean, that of the first or last token, or
what a classifier says of it."""

CACHE_TYPES = {"FP16": lib.GGML_TYPE_F16, "Q8": lib.GGML_TYPE_Q8_0, "Q4": lib.GGML_TYPE_Q4_0}

_TOKEN_TEXT_BYTES = 1024
# What stands in a GGUF file before its tensors. The largest vocabularies take some 20 MB.
_LARGEST_HEADER_BYTES = 128 << 20
_COMPARED_TOKENS = 64
_AUTOMATIC = -1
_NO_TEXT = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_UNUSED
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_GGML_LOG_CONTINUED = 5
# Said each time the cache is full, which is answered by making room (see `KvCacheFull`), and of a pooling
# that was chosen where the model's file has none.
_EXPECTED = (
    "failed to find",
    "failed to restore kv cache",
    "error loading state",
    "model default pooling_type",
)


# Architectures whose cache refuses to drop or to copy a part of a sequence, though they have no state.
_WITH_COMPRESSED_CACHE = ("deepseek4",)


class KvCacheFull(Exception):
    """The batch does not fit the KV cache; nothing was computed."""


class DecodeFailed(Exception):
    """llama.cpp could not compute a batch; the KV cache is not to be trusted any more."""


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _forward_log(level: int, text: bytes, _: object) -> None:
    """llama.cpp's own log lines; what it says at level "info" is for its developers."""
    line = text.decode(errors="replace").strip()
    is_expected = any(words in line for words in _EXPECTED)
    if line and level != _GGML_LOG_CONTINUED and not is_expected:
        logger.log(_LOG_LEVELS.get(level, logging.DEBUG), "%s", line)


def initialize() -> None:
    """Prepare llama.cpp once per process."""
    lib.llama_log_set(_forward_log, ctypes.c_void_p(0))
    lib.llama_backend_init()


def supports_gpus() -> bool:
    """Whether this build of llama.cpp can use a GPU."""
    return bool(lib.llama_supports_gpu_offload())


def max_sequences() -> int:
    """Sequences that one context may have."""
    return int(lib.llama_max_parallel_sequences())


def max_gpus() -> int:
    """GPUs that a model may be split over."""
    return int(lib.llama_max_devices())


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    gpu_layers: int
    """Layers on the GPU; -1: all."""
    gpu_split: tuple[float, ...] = ()
    """Share of the model on each visible GPU, in any unit."""
    use_mmap: bool = True
    use_mlock: bool = False
    cache_folder: Path | None = None
    """Where the vocabulary is kept from one start to the next; None: nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions:
    cells: int
    """Tokens that the KV cache holds, over all sequences."""
    sequences: int
    """Sequences that may be in the cache at once."""
    shares_cells: bool = True
    """One pool of cells for all sequences; else each has its own `cells / sequences` of them."""
    outputs: int = 0
    """Tokens of one batch whose logits may be wanted; 0: one of each sequence."""
    batch_tokens: int
    micro_batch_tokens: int
    threads: int
    batch_threads: int
    cache_type: int
    flash_attention: bool | None
    """None: wherever the model's devices have it, the CPU among them."""
    offload_kv: bool
    rope_freq_base: float
    rope_freq_scale: float
    pooling: str | None = None
    """One of `POOLINGS`: to make a vector of each sequence. None: to make logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFrame:
    """The tokens around a query and a document that are ranked together."""

    start: tuple[int, ...]
    between: tuple[int, ...]
    end: tuple[int, ...]


class NativeModel:
    """A loaded GGUF model."""

    def __init__(
        self, path: Path, options: ModelOptions, *, report_progress: Callable[[float], None] | None = None
    ) -> None:
        """
        Args:
            report_progress: told which part of the weights has been read, 0 to 1.

        Raises:
            ModelLoadFailed: llama.cpp refused the file, or there is too little memory.
        """
        params = lib.llama_model_default_params()
        params.n_gpu_layers = options.gpu_layers
        params.load_mode = _load_mode(options)
        split = (ctypes.c_float * max(max_gpus(), 1))(*options.gpu_split)
        if options.gpu_split:
            params.tensor_split = split
        # Kept in a variable, as llama.cpp calls it for as long as it loads.
        on_progress = _progress_callback(report_progress)
        if on_progress is not None:
            params.progress_callback = on_progress
        self._pointer = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._pointer:
            raise ModelLoadFailed(f"llama.cpp could not load {path}; its log lines say why.")
        self._path = path
        self._cache_folder = options.cache_folder
        self._vocab = lib.llama_model_get_vocab(self._pointer)
        self.vocabulary_size: int = lib.llama_vocab_n_tokens(self._vocab)
        self.trained_context_length: int = lib.llama_model_n_ctx_train(self._pointer)
        self.chat_template = (lib.llama_model_chat_template(self._pointer, None) or b"").decode()
        self.can_forget_partly = not (
            lib.llama_model_is_recurrent(self._pointer)
            or lib.llama_model_is_hybrid(self._pointer)
            or self.architecture in _WITH_COMPRESSED_CACHE
        )
        """Whether the end of a sequence can be dropped: not so where a state sums up all that was read."""

        self.has_window: bool = lib.llama_model_n_swa(self._pointer) > 0
        """Whether some layers look back only so far, and a snapshot holds no more of them than that."""

    @property
    def architecture(self) -> str:
        return self._metadata("general.architecture")

    @property
    def dimensions(self) -> int:
        """Of the vectors that it makes."""
        return int(lib.llama_model_n_embd_out(self._pointer))

    @property
    def classes(self) -> int:
        """What its classifier tells apart, if it has one; 1: it gives a score."""
        return int(lib.llama_model_n_cls_out(self._pointer))

    @property
    def has_encoder(self) -> bool:
        """Whether it reads a text with one part and writes with another."""
        return bool(lib.llama_model_has_encoder(self._pointer))

    @property
    def pooling(self) -> str | None:
        """One of `POOLINGS`, as the model's file has it; None where it says nothing."""
        written = self._metadata(f"{self.architecture}.pooling_type")
        return next((name for name, number in POOLINGS.items() if str(number) == written), None)

    @property
    def rerank_template(self) -> str | None:
        """The prompt around {query} and {document}, where the model has one."""
        template = lib.llama_model_chat_template(self._pointer, b"rerank")
        return None if template is None else template.decode()

    @property
    def pair_frame(self) -> PairFrame:
        """For models without a `rerank_template`: [BOS] query [EOS] [SEP] document [EOS], of those that the
        vocabulary asks for."""
        vocab = self._vocab
        separator = int(lib.llama_vocab_sep(vocab))
        last = int(lib.llama_vocab_eos(vocab))
        end = (separator if last < 0 else last,) if lib.llama_vocab_get_add_eos(vocab) else ()
        return PairFrame(
            start=(int(lib.llama_vocab_bos(vocab)),) if lib.llama_vocab_get_add_bos(vocab) else (),
            between=(*end, separator) if lib.llama_vocab_get_add_sep(vocab) else end,
            end=end,
        )

    @property
    def control_tokens(self) -> dict[str, int]:
        """By name."""
        marked = [
            token
            for token in range(self.vocabulary_size)
            if lib.llama_vocab_get_attr(self._vocab, token) & lib.LLAMA_TOKEN_ATTR_CONTROL
        ]
        names = (text.decode(errors="replace") for text in self.token_texts(marked))
        return {name: token for name, token in zip(names, marked, strict=True) if name}

    @property
    def has_classifier(self) -> bool:
        """Whether it can rank. True, too, where its file cannot be looked into."""
        header = self._header()
        names = (len(name).to_bytes(8, "little") + name for name in (b"cls.weight", b"cls.output.weight"))
        return header is None or any(name in header for name in names)

    def _metadata(self, key: str) -> str:
        """A value of the model's file; "" where it has none."""
        value = ctypes.create_string_buffer(64)
        lib.llama_model_meta_val_str(self._pointer, key.encode(), value, len(value))
        return value.value.decode(errors="replace")

    @property
    def pointer(self) -> Any:
        return self._pointer

    def tokenize(
        self, text: bytes, *, parse_control_tokens: bool, add_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: begin and end it as the vocabulary asks for; else nothing is added.
        """
        room = len(text) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = lib.llama_tokenize(
                self._vocab, text, len(text), tokens, room, add_special_tokens, parse_control_tokens
            )
            if count >= 0:
                return list(tokens[:count])
            # Some vocabularies write one character as several, and one of three bytes as up to 18.
            assert count < -room, "llama.cpp says how much room it needs"
            room = -count

    def read_vocabulary(self, extra_end_tokens: Sequence[str]) -> Vocabulary:
        """The tokens as bytes, with the control tokens by name.

        Raises:
            InvalidConfig: an extra end token is not a token of this model.
        """
        tables = self._tables()
        texts, attributes = tables.texts, np.array(tables.attributes, dtype=np.int64)
        ends = set(tables.end_token_ids) | {self._end_token(text) for text in extra_end_tokens}
        plain = list(texts)
        for token in (*np.flatnonzero(attributes & _NO_TEXT), *ends):
            plain[token] = b""
        return Vocabulary(
            tokens=tuple(plain),
            control_tokens={
                texts[token].decode(errors="replace"): int(token)
                for token in np.flatnonzero(attributes & lib.LLAMA_TOKEN_ATTR_CONTROL)
                if texts[token]
            },
            marks=frozenset(
                texts[token].decode(errors="replace")
                for token in np.flatnonzero(attributes & lib.LLAMA_TOKEN_ATTR_USER_DEFINED)
            ),
            end_token_ids=frozenset(ends),
            end_token_id=self._preferred_end(ends),
            start_token_id=self._start_token(),
            infill=self._infill_tokens(),
            encode=self._encoder(),
            fingerprint=hashlib.sha256(b"\0".join(texts)).hexdigest(),
        )

    def close(self) -> None:
        lib.llama_model_free(self._pointer)

    def _tables(self) -> VocabularyTables:
        """The vocabulary as llama.cpp has it, from the cache where it is there."""
        digest = None if self._cache_folder is None else self._header_digest()
        if self._cache_folder is None or digest is None:
            return self._build_tables()
        return cached_tables(self._cache_folder / digest, self._build_tables, self._fits)

    def _header_digest(self) -> str | None:
        header = self._header()
        return None if header is None else hashlib.sha256(header).hexdigest()

    def _header(self) -> bytes | None:
        """All in the model's file but its tensors: a few megabytes, whatever the model's size.

        None for a model that is split over several files; it takes long to load anyway.
        """
        try:
            header_bytes = self._path.stat().st_size - lib.llama_model_size(self._pointer)
            if self._is_split() or not 0 < header_bytes <= _LARGEST_HEADER_BYTES:
                return None
            with self._path.open("rb") as file:
                return file.read(header_bytes)
        except OSError:
            return None

    def _is_split(self) -> bool:
        return bool(lib.llama_model_meta_val_str(self._pointer, b"split.count", None, 0) >= 0)

    def _build_tables(self) -> VocabularyTables:
        tokens = range(self.vocabulary_size)
        return VocabularyTables(
            made_by=_versions(),
            texts=tuple(self.token_texts(tokens)),
            attributes=tuple(lib.llama_vocab_get_attr(self._vocab, token) for token in tokens),
            end_token_ids=tuple(token for token in tokens if lib.llama_vocab_is_eog(self._vocab, token)),
        )

    def _fits(self, tables: VocabularyTables) -> bool:
        """Whether tables from elsewhere are as long as this vocabulary, and the same in a few places."""
        size = self.vocabulary_size
        if tables.made_by != _versions() or not len(tables.texts) == len(tables.attributes) == size:
            return False
        if not all(0 <= token < size for token in tables.end_token_ids):
            return False
        looked_at = range(0, size, max(1, size // _COMPARED_TOKENS))
        return list(self.token_texts(looked_at)) == [tables.texts[token] for token in looked_at]

    def token_texts(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """The text of each token; of control tokens the name."""
        buffer = ctypes.create_string_buffer(_TOKEN_TEXT_BYTES)
        for token in tokens:
            length = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
            if length < 0:
                buffer = ctypes.create_string_buffer(-length)
                length = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
            yield ctypes.string_at(buffer, length)

    def _end_token(self, text: str) -> int:
        tokens = self.tokenize(text.encode(), parse_control_tokens=True)
        if len(tokens) != 1:
            raise InvalidConfig(f"`eos_token_list` has {text!r}, which is not one token of this model.")
        return tokens[0]

    def _preferred_end(self, ends: set[int]) -> int:
        candidates = (lib.llama_vocab_eot(self._vocab), lib.llama_vocab_eos(self._vocab), *sorted(ends))
        for token in candidates:
            if token in ends:
                return int(token)
        raise ModelLoadFailed("The model has no token that ends an answer; name one in `eos_token_list`.")

    def _start_token(self) -> int | None:
        if not lib.llama_vocab_get_add_bos(self._vocab):
            return None
        return int(lib.llama_vocab_bos(self._vocab))

    def _infill_tokens(self) -> InfillTokens | None:
        fill_in = (lib.llama_vocab_fim_pre, lib.llama_vocab_fim_suf, lib.llama_vocab_fim_mid)
        tokens = [int(token_of(self._vocab)) for token_of in fill_in]
        if lib.LLAMA_TOKEN_NULL in tokens:
            return None
        prefix, suffix, middle = tokens
        return InfillTokens(prefix=prefix, suffix=suffix, middle=middle)

    def _encoder(self) -> Any:
        """Tokenization of text from the middle of an answer.

        Some models' tokenizers put a blank in front of every text; a newline takes it, and is dropped again.
        """
        newline = self.tokenize(b"\n", parse_control_tokens=False)
        adds_blank = len(newline) > 1

        def encode(text: bytes) -> list[int]:
            if not adds_blank:
                return self.tokenize(text, parse_control_tokens=False)
            return self.tokenize(b"\n" + text, parse_control_tokens=False)[len(newline) :]

        return encode


def _versions() -> str:
    """What reads vocabularies: gallama and llama.cpp, whose library may have been built anew."""
    library = Path(lib._lib._name).stat()
    parts = (gallama.__version__, llama_cpp.__version__, library.st_size, library.st_mtime_ns)
    return " ".join(map(str, parts))


def _progress_callback(report_progress: Callable[[float], None] | None) -> Any:
    if report_progress is None:
        return None

    def go_on(fraction: float, _: object) -> bool:
        report_progress(fraction)
        return True

    return lib.llama_progress_callback(go_on)


def _load_mode(options: ModelOptions) -> int:
    if options.use_mmap and options.use_mlock:
        return int(lib.LLAMA_LOAD_MODE_MMAP_MLOCK)
    if options.use_mlock:
        return int(lib.LLAMA_LOAD_MODE_MLOCK)
    return int(lib.LLAMA_LOAD_MODE_MMAP if options.use_mmap else lib.LLAMA_LOAD_MODE_NONE)


class NativeContext:
    """A model's KV cache and compute buffers, with one reusable batch."""

    def __init__(self, model: NativeModel, options: ContextOptions) -> None:
        self._model = model
        params = _context_params(options)
        self._pointer = lib.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise ModelLoadFailed(
                f"llama.cpp could not make a context of {options.cells} tokens; its log lines say"
                " why. Where memory is short, set a smaller `cache_size`."
            )
        self._memory = lib.llama_get_memory(self._pointer)
        self.cells: int = lib.llama_n_ctx(self._pointer)
        self.shares_cells = options.shares_cells
        self.has_cache = self._memory is not None
        """Else each batch is all that its tokens see."""
        self.is_causal = bool(lib.llama_get_causal_attn(self._pointer))
        self._batch = _Batch(options.batch_tokens)
        self._row_type = ctypes.c_float * model.vocabulary_size

    def decode(self, sequences: NDArray[np.int32], positions: NDArray[np.int32], tokens: NDArray[np.int32],
               wants_logits: NDArray[np.int8]) -> None:  # fmt: skip
        """Compute one batch: four arrays of one entry per token.

        Raises:
            KvCacheFull: there is no room; nothing has changed.
            DecodeFailed: the computation broke.
        """
        code = lib.llama_decode(self._pointer, self._batch.fill(sequences, positions, tokens, wants_logits))
        if code == 1:
            raise KvCacheFull
        if code != 0:
            raise DecodeFailed(f"llama_decode returned {code}")

    def set_threads(self, threads: int, batch_threads: int) -> None:
        """Compute later batches with so many threads, those of several tokens with `batch_threads`."""
        lib.llama_set_n_threads(self._pointer, threads, batch_threads)

    def logits(self, batch_index: int) -> NDArray[np.float32]:
        """The logits of one token of the last batch, shape (vocabulary size,), until the next decode."""
        row = lib.llama_get_logits_ith(self._pointer, batch_index)
        # A tenth of what np.ctypeslib.as_array takes; this is done for every token.
        values = self._row_type.from_address(ctypes.addressof(row.contents))
        return np.frombuffer(memoryview(values).cast("B"), np.float32)

    def make_vectors(self, *, enabled: bool) -> None:
        """Whether later batches make vectors of their sequences. For that all of their tokens are computed to
        the end; else only those whose logits are wanted."""
        lib.llama_set_embeddings(self._pointer, enabled)

    def vectors(self, sequences: int, width: int) -> NDArray[np.float32]:
        """What the last batch made of its sequences 0, 1, ..., shape (sequences, width)."""
        rows = (lib.llama_get_embeddings_seq(self._pointer, sequence) for sequence in range(sequences))
        return np.array([np.ctypeslib.as_array(row, (width,)) for row in rows], dtype=np.float32)

    def forget(self, sequence: int, from_position: int) -> None:
        """Drop a sequence's tokens from a position on."""
        removed = lib.llama_memory_seq_rm(self._memory, sequence, from_position, -1)
        assert removed, "only models that can forget partly are asked to"

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target`, which is empty, share the first `length` tokens of `source`."""
        lib.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def save(self, sequence: int) -> NDArray[np.uint8]:
        """What the cache holds of a sequence, shape (bytes,), to be restored in this context."""
        snapshot = _returnable_memory(lib.llama_state_seq_get_size(self._pointer, sequence))
        data = _pointer_to(snapshot, ctypes.c_uint8)
        written = lib.llama_state_seq_get_data(self._pointer, data, snapshot.nbytes, sequence)
        assert written == snapshot.nbytes, "a snapshot is as large as it was announced"
        return snapshot

    def restore(self, sequence: int, snapshot: NDArray[np.uint8]) -> None:
        """Fill a sequence, which is empty, with what was saved of one.

        Raises:
            KvCacheFull: there is no room; the sequence is still empty.
        """
        data = _pointer_to(snapshot, ctypes.c_uint8)
        if lib.llama_state_seq_set_data(self._pointer, data, snapshot.nbytes, sequence) == 0:
            self.forget(sequence, 0)
            raise KvCacheFull

    def warm_up(self, token: int) -> None:
        """Compute one token and forget it."""
        zero = np.zeros(1, dtype=np.int32)
        self.decode(zero, zero, np.array([token], dtype=np.int32), np.ones(1, dtype=np.int8))
        self.clear()

    def clear(self, *, zero: bool = True) -> None:
        """Empty the cache; overwriting what was in it takes as long as the cache is large."""
        lib.llama_memory_clear(self._memory, zero)

    def close(self) -> None:
        lib.llama_free(self._pointer)


def _context_params(options: ContextOptions) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = options.cells
    params.n_seq_max = options.sequences
    params.n_outputs_max = options.outputs or options.sequences
    params.n_batch = options.batch_tokens
    params.n_ubatch = options.micro_batch_tokens
    params.n_threads = options.threads
    params.n_threads_batch = options.batch_threads
    params.type_k = options.cache_type
    params.type_v = options.cache_type
    params.flash_attn_type = _AUTOMATIC if options.flash_attention is None else int(options.flash_attention)
    params.offload_kqv = options.offload_kv
    params.rope_freq_base = options.rope_freq_base
    params.rope_freq_scale = options.rope_freq_scale
    params.kv_unified = options.shares_cells
    params.no_perf = True
    if options.pooling is not None:
        params.embeddings = True
        params.pooling_type = POOLINGS[options.pooling]
    return params


class _Batch:
    """A llama_batch over arrays that are made once."""

    def __init__(self, capacity: int) -> None:
        self._tokens = np.zeros(capacity, dtype=np.int32)
        self._positions = np.zeros(capacity, dtype=np.int32)
        self._sequences = np.zeros(capacity, dtype=np.int32)
        self._wants_logits = np.zeros(capacity, dtype=np.int8)
        one_sequence_each = np.ones(capacity, dtype=np.int32)
        addresses = self._sequences.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)
        self._kept_alive = (one_sequence_each, addresses)
        self._native = lib.llama_batch(
            n_tokens=0,
            token=_pointer_to(self._tokens, ctypes.c_int32),
            pos=_pointer_to(self._positions, ctypes.c_int32),
            n_seq_id=_pointer_to(one_sequence_each, ctypes.c_int32),
            seq_id=_pointer_to(addresses, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer_to(self._wants_logits, ctypes.c_int8),
        )

    def fill(self, sequences: NDArray[np.int32], positions: NDArray[np.int32], tokens: NDArray[np.int32],
             wants_logits: NDArray[np.int8]) -> Any:  # fmt: skip
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        self._wants_logits[:count] = wants_logits
        self._native.n_tokens = count
        return self._native


def _returnable_memory(size: int) -> NDArray[np.uint8]:
    """Memory that the system has back as soon as nobody holds the array, shape (size,).

    malloc keeps what is given back to it. Snapshots of many lengths, taken and dropped in another order,
    leave gaps there: half as much again as they hold themselves.

    Raises:
        MemoryError: there is not so much.
    """
    # Page by page, as it is written to, takes twice as long.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    try:
        return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=np.uint8)
    except OSError as error:
        raise MemoryError(f"the system has no {size} bytes") from error


def _pointer_to(array: NDArray[Any], item: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(item))


class SamplerChain:
    """llama.cpp's samplers, applied in the order in which they were added."""

    def __init__(self) -> None:
        self._pointer = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())

    def add(self, sampler: Any) -> None:
        lib.llama_sampler_chain_add(self._pointer, sampler)

    def accept(self, token: int) -> None:
        """Tell the samplers which token was taken; penalties count them."""
        lib.llama_sampler_accept(self._pointer, token)

    def pick(self, candidates: Candidates) -> int:
        """Let the samplers choose one of the candidates."""
        data = candidates.native()
        lib.llama_sampler_apply(self._pointer, ctypes.byref(data))
        assert 0 <= data.selected < data.size, "the chain's last sampler selects"
        return int(data.data[data.selected].id)

    def close(self) -> None:
        lib.llama_sampler_free(self._pointer)


class Candidates:
    """Tokens and their logits as llama.cpp's samplers take them. Reusable."""

    def __init__(self, vocabulary_size: int) -> None:
        fields = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._rows = np.zeros(vocabulary_size, dtype=fields)
        self._all_ids = np.arange(vocabulary_size, dtype=np.int32)
        self._count = 0

    def set_all(self, logits: NDArray[np.float32]) -> None:
        """Offer the whole vocabulary."""
        self._set(self._all_ids, logits)

    def set_some(self, token_ids: NDArray[np.integer[Any]], logits: NDArray[np.float32]) -> None:
        """Offer only these tokens, given the logits of the whole vocabulary."""
        self._set(token_ids, logits[token_ids])

    def _set(self, token_ids: NDArray[np.integer[Any]], logits: NDArray[np.float32]) -> None:
        self._count = len(token_ids)
        self._rows["id"][: self._count] = token_ids
        self._rows["logit"][: self._count] = logits

    def native(self) -> Any:
        data = _pointer_to(self._rows, lib.llama_token_data)
        return lib.llama_token_data_array(data=data, size=self._count, selected=-1, sorted=False)


def make_penalties(
    vocabulary_size: int,
    *,
    last_tokens: int,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> Any:
    return lib.llama_sampler_init_penalties(vocabulary_size, last_tokens, repetition, frequency, presence)


def accept_into(sampler: Any, tokens: Sequence[int]) -> None:
    """Let one sampler, not yet in a chain, know of tokens before the answer."""
    for token in tokens:
        lib.llama_sampler_accept(sampler, token)


def make_logit_bias(vocabulary_size: int, biases: dict[int, float]) -> Any:
    entries = (lib.llama_logit_bias * len(biases))(*biases.items())
    return lib.llama_sampler_init_logit_bias(vocabulary_size, len(biases), entries)


def make_top_k(count: int) -> Any:
    return lib.llama_sampler_init_top_k(count)


def make_top_p(probability: float) -> Any:
    return lib.llama_sampler_init_top_p(probability, 1)


def make_min_p(probability: float) -> Any:
    return lib.llama_sampler_init_min_p(probability, 1)


def make_temperature(temperature: float) -> Any:
    return lib.llama_sampler_init_temp(temperature)


def make_distribution(seed: int) -> Any:
    return lib.llama_sampler_init_dist(seed)


def make_greedy() -> Any:
    return lib.llama_sampler_init_greedy()
