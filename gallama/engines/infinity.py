"""Models in folders of Hugging Face's form that embed or rank, through infinity-emb.

infinity-emb brings what many requests ask for together into batches. It is given token ids, not texts: each
text is cut up once, here, so that its length is known before anything is computed and ids that a client sends
are taken as they are. A batch becomes one forward pass, or a few where less is computed so:

    embed(texts) -> tokens -> full batches -> infinity-emb's threads -> forward passes -> a row for each text
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field

from gallama.config import ModelSpec
from gallama.embedding import EmbeddedTexts, RankedTexts
from gallama.engines import ignore_progress
from gallama.engines.extra_arguments import read_extra_arguments
from gallama.engines.full_batches import FullBatches
from gallama.engines.processor_cores import Cores, OwnCores, cores_to_share
from gallama.engines.text_limits import check_characters, reading_parts
from gallama.errors import (
    InvalidConfig,
    InvalidRequest,
    MissingExtra,
    ModelLoadFailed,
    TextTooLong,
    UnsupportedValue,
    WorkerUnavailable,
)
from gallama.generation import EngineStatus, ReportProgress

logger = logging.getLogger(__name__)

# What it does by default would reach for the network, or tell somebody of its use.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
}
_LIBRARIES = ("infinity_emb", "sentence_transformers")
_PART_OF_IMPORTS, _PART_OF_WEIGHTS = 0.5, 0.9

# So long infinity-emb waits after each batch, and between two looks at its queue. Its own 5 ms are a good
# part of the time that a short text takes.
_BATCH_DELAY_SECONDS = 0.001

# A small model computes so many tokens in the time that it takes to begin a pass; larger ones compute fewer.
_PASS_TOKENS_OF_CPU, _PASS_TOKENS_OF_GPU = 64, 4096

# So many passes for each core, if there is so much to compute: that all of them end at about the same time.
_PASSES_OF_A_CORE = 2

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_DTYPES = ("float32", "float16", "bfloat16")


def _split_at_commas(value: object) -> object:
    return value.split(",") if isinstance(value, str) and value != "any" else value


class InfinityOptions(BaseModel, extra="forbid", frozen=True):
    """The keys of `backend_extra_args`."""

    batch_size: int = Field(32, ge=1, le=1024)
    """Texts of one batch, at most."""
    batch_tokens: int = Field(16384, ge=1, le=2**24)
    """Tokens of one forward pass, padding included, at most; a text that is longer has one of its own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    n_threads: int | None = Field(None, ge=1, le=1024)
    matryoshka_dimensions: Annotated[
        Literal["any"] | tuple[Annotated[int, Field(ge=1)], ...] | None, BeforeValidator(_split_at_commas)
    ] = None
    """Numbers of dimensions to which the vectors may be cut, where the model's own files do not tell."""
    trust_remote_code: bool = False
    """Whether to run Python code that lies in the model's folder."""


class Pair(NamedTuple):
    """What a model that ranks reads together."""

    query: str
    document: str


Input = str | Pair | Sequence[int]


@dataclass(slots=True)
class Tokens:
    """What the model reads of one text, or of one pair, special tokens included."""

    ids: Sequence[int]
    type_ids: Sequence[int] = ()
    """Which of a pair each token is of; (): all of the first."""
    is_given_up: bool = False
    """Whether nobody waits any more for what becomes of it."""

    def __len__(self) -> int:
        return len(self.ids)

    def __radd__(self, _: object) -> Tokens:
        """infinity-emb adds query and document to see how long a pair is; it is given all as the document."""
        return self


def load(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> InfinityEmbedder:
    """Load the model in the folder `path`.

    Raises:
        InvalidConfig: the spec asks for what cannot be.
        MissingExtra: infinity-emb is not installed.
        ModelLoadFailed: the folder holds no model that embeds or ranks.
    """
    options = read_extra_arguments(InfinityOptions, spec, backend="embedding")
    config = _read_config(path)
    if not options.trust_remote_code:
        _check_modules(path)
    report_progress(0)
    infinity, torch = _import_libraries()
    report_progress(_PART_OF_IMPORTS)
    device = _choose_device(spec, options, torch)
    arguments = infinity.EngineArgs(
        model_name_or_path=str(path),
        served_model_name=path.name,
        revision=None,
        trust_remote_code=options.trust_remote_code,
        engine="torch",
        device=device,
        device_id=list(range(_replicas(spec))) if device == "cuda" else [],
        dtype=_choose_dtype(options, device, config),
        batch_size=options.batch_size,
        compile=False,
        bettertransformer=False,
        model_warmup=False,
        lengths_via_tokenize=False,
        vector_disk_cache_path="",
        pooling_method="auto",
        embedding_dtype="float32",
    )
    try:
        engine = infinity.AsyncEmbeddingEngine.from_args(arguments)
    except Exception as error:  # its libraries raise whatever they like
        logger.exception("The model cannot be loaded.")
        raise ModelLoadFailed(f"{path.name} cannot be loaded: {type(error).__name__}: {error}") from error
    report_progress(_PART_OF_WEIGHTS)
    is_shared = device == "cpu" and options.n_threads is None
    cores = cores_to_share() if is_shared else OwnCores(options.n_threads or torch.get_num_threads())
    return InfinityEmbedder(engine, spec, options, config, device, cores)


class InfinityEmbedder:
    """One model on infinity-emb's engine, which starts with the first request."""

    def __init__(
        self,
        engine: Any,
        spec: ModelSpec,
        options: InfinityOptions,
        config: Mapping[str, Any],
        device: str,
        cores: Cores,
    ) -> None:
        """
        Args:
            engine: an AsyncEmbeddingEngine that is not started.
            config: the model's config.json.

        Raises:
            InvalidConfig: the spec asks for what the model cannot do.
            ModelLoadFailed: it neither embeds nor ranks, or reads texts in a way that is not known here.
        """
        model = engine._model_replicas[0]
        self._ranks = _ranks(model)
        self._tokenizer = TextReader(model)
        self._prompt = _default_prompt(model)
        self._passes = [
            ForwardPasses(
                replica,
                self._tokenizer,
                cores,
                batch_tokens=options.batch_tokens,
                pass_tokens=_PASS_TOKENS_OF_CPU if device == "cpu" else _PASS_TOKENS_OF_GPU,
                is_on_cpu=device == "cpu",
            )
            for replica in engine._model_replicas
        ]
        engine._model_replicas = self._passes
        self._engine = engine
        self._batches = FullBatches(self._ask, batch_size=options.batch_size, at_once=len(self._passes))
        self._busy_calls = 0
        self._is_closing = False
        self._check_features(model)
        own_length = _own_context_length(model, config)
        self.context_length = spec.max_seq_len or own_length
        self.dimensions = self._try_out(self.context_length if self.context_length > own_length else 2)
        self.shorter_dimensions = _shorter_dimensions(options, config, self.dimensions)

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.read([text], add_special_tokens=add_special_tokens)[0].ids)

    def token_texts(self, token_ids: Sequence[int]) -> list[bytes]:
        self._tokenizer.check(token_ids)
        return [self._tokenizer.text_of(token_id) for token_id in token_ids]

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> EmbeddedTexts:
        if self._ranks:
            raise UnsupportedValue("The model ranks texts, and makes no vectors of them.", param="model")
        texts = [self._prompt + each if isinstance(each, str) else each for each in inputs]
        with self._working():
            tokens = await self._read(texts, "input")
            vectors = await self._compute(tokens)
        return EmbeddedTexts(vectors=vectors, tokens=sum(map(len, tokens)))

    async def rerank(self, query: str, documents: Sequence[str]) -> RankedTexts:
        if not self._ranks:
            raise UnsupportedValue("The model makes vectors of texts, and does not rank.", param="model")
        with self._working():
            pairs = await self._read([Pair(query, document) for document in documents], "documents")
            scores = await self._compute(pairs)
        return RankedTexts(scores=[float(score) for score in scores], tokens=sum(map(len, pairs)))

    def status(self) -> EngineStatus:
        return EngineStatus(
            busy_slots=self._busy_calls,
            waiting=self._batches.waiting,
            cached_tokens=0,
            steps=sum(replica.count for replica in self._passes),
        )

    async def probe(self) -> None:
        await self._compute(self._tokenizer.read([Pair("a", "b") if self._ranks else "a"]))

    async def close(self) -> None:
        self._is_closing = True
        self._batches.close()  # infinity-emb itself would let them wait for ever
        await self._engine.astop()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        self._busy_calls += 1
        try:
            yield
        finally:
            self._busy_calls -= 1

    async def _read(self, inputs: Sequence[Input], name: str) -> list[Tokens]:
        """The tokens of each input.

        Raises:
            TextTooLong: one has more than the model takes.
            InvalidRequest: one has none, or one that the model does not have.
        """
        tokens: list[Tokens] = []
        for indexes in reading_parts([_characters(each) for each in inputs]):
            part = [inputs[index] for index in indexes]
            names = [f"{name}[{index}]" for index in indexes]
            tokens += await asyncio.to_thread(self._read_part, part, names)
        return tokens

    def _read_part(self, inputs: Sequence[Input], names: Sequence[str]) -> list[Tokens]:
        limit = self.context_length
        for each, name in zip(inputs, names, strict=True):
            self._check_input(each, name)
        tokens = self._tokenizer.read(inputs)
        for read, each, name in zip(tokens, inputs, names, strict=True):
            if len(read) > limit:
                which = f"The query and `{name}` have" if isinstance(each, Pair) else f"`{name}` has"
                raise TextTooLong(f"{which} {len(read)} tokens; the model takes {limit}.", param=_field(name))
        return tokens

    def _check_input(self, each: Input, name: str) -> None:
        """What can be said without cutting up a text."""
        if not isinstance(each, str | Pair):
            if not each:
                raise InvalidRequest(f"`{name}` has no token.", param=_field(name))
            self._tokenizer.check(each, name)
            return
        check_characters(_characters(each), name, context_length=self.context_length, param=_field(name))

    async def _compute(self, texts: list[Tokens]) -> NDArray[np.float32]:
        """
        Returns:
            Shape (texts, dimensions) of vectors, or (texts,) of scores.

        Raises:
            WorkerUnavailable: a forward pass failed, its numbers ran over, or the model is closed.
        """
        await self._start()
        # Alike ones together: there is less to pad.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        try:
            rows = await self._batches.compute([texts[index] for index in order])
        except asyncio.CancelledError:
            for text in texts:
                text.is_given_up = True
            self._check_open()
            raise
        computed = np.empty((len(texts), *np.shape(rows[0])), dtype=np.float32)
        computed[order] = rows
        if not np.isfinite(computed).all():
            raise WorkerUnavailable("The model could not compute this; the worker's log says why.")
        return computed

    async def _ask(self, texts: list[Tokens]) -> Sequence[NDArray[np.float32]]:
        """A row for each text, by infinity-emb's batches."""
        if not self._ranks:
            rows, _ = await self._engine.embed(sentences=texts)
            return cast("Sequence[NDArray[np.float32]]", rows)
        ranked, _ = await self._engine.rerank(query="", docs=texts)
        return [each.relevance_score for each in sorted(ranked, key=lambda each: each.index)]

    def _check_open(self) -> None:
        """
        Raises:
            WorkerUnavailable: the model is closed, or will be.
        """
        if self._is_closing:
            raise WorkerUnavailable("The model is being unloaded.")

    async def _start(self) -> None:
        self._check_open()
        if self._engine.is_running:
            return
        await self._engine.astart()
        batches = self._engine._batch_handler
        batches.batch_delay = _BATCH_DELAY_SECONDS
        for worker in batches.model_worker:
            worker._batch_delay = _BATCH_DELAY_SECONDS

    def _check_features(self, model: Any) -> None:
        """Whether the model's own library reads texts as they are read here.

        Raises:
            ModelLoadFailed: it does not.
        """
        texts = ["A text.", "  Another Text, to which the first must be padded."]
        pairs = [Pair("a query", text) for text in texts]
        expected = model.encode_pre([tuple(pair) for pair in pairs] if self._ranks else texts)
        read = self._passes[0].features(self._tokenizer.read(pairs if self._ranks else texts))
        if expected.keys() != read.keys() or not all(expected[key].equal(read[key]) for key in read):
            raise ModelLoadFailed(
                "The model reads texts in a way that the embedding backend does not know: what it makes of"
                " them would be wrong."
            )

    def _try_out(self, length: int) -> int:
        """Compute a text of so many tokens; the dimensions of its vector, 0 for a model that ranks.

        Raises:
            InvalidConfig: the model does not take so many.
            ModelLoadFailed: it computes nothing.
        """
        token_ids = self._tokenizer.read(["a"])[0].ids
        row = self._passes[0].compute([Tokens([token_ids[i % len(token_ids)] for i in range(length)])])[0]
        if np.isfinite(row).all():
            return 0 if self._ranks else len(row)
        if length == self.context_length:
            raise InvalidConfig(f"`max_seq_len` is {length}; the model does not take so many tokens.")
        raise ModelLoadFailed("The model's forward pass fails; the worker's log says why.")


class TextReader:
    """Cuts texts up into a model's tokens. Many threads may do so at a time."""

    def __init__(self, model: Any) -> None:
        """
        Raises:
            ModelLoadFailed: the model's tokenizer is a slow one.
        """
        tokenizer = model.tokenizer
        if not tokenizer.is_fast:
            raise ModelLoadFailed(
                "The embedding backend needs a model with a fast tokenizer, in tokenizer.json."
            )
        # A copy: where the model's own is set to truncate, no other thread may use it.
        self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._lowers_case = not _ranks(model) and bool(getattr(model[0], "do_lower_case", False))
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._bytes_of_characters = _byte_level(self._tokenizer)
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False).ids
        self.pads_left = tokenizer.padding_side == "left"
        self.pad_token_id = int(tokenizer.pad_token_id or 0)
        self.has_types = "token_type_ids" in tokenizer.model_input_names

    def read(self, inputs: Sequence[Input], *, add_special_tokens: bool = True) -> list[Tokens]:
        """The tokens of texts; ids are what they are."""
        texts = [self._prepared(each) for each in inputs if isinstance(each, str | Pair)]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens))
        return [self._next_tokens(encoded, each) for each in inputs]

    def check(self, token_ids: Sequence[int], name: str = "tokens") -> None:
        """
        Raises:
            InvalidRequest: the model does not have one of them.
        """
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < self._size), None)
        if wrong is not None:
            raise InvalidRequest(
                f"`{name}` has the token {wrong}; the model's are 0 to {self._size - 1}.", param=_field(name)
            )

    def text_of(self, token_id: int) -> bytes:
        """What a token stands for in a text; a special one by name."""
        written: str = self._tokenizer.id_to_token(token_id) or ""
        if token_id in self._special_ids:
            return written.encode()
        if byte := _BYTE_TOKEN.fullmatch(written):
            return bytes([int(byte[1], 16)])
        if self._bytes_of_characters and all(each in self._bytes_of_characters for each in written):
            return bytes(self._bytes_of_characters[each] for each in written)
        before: str = self._tokenizer.decode(self._anchor)
        after: str = self._tokenizer.decode([*self._anchor, token_id])
        return after[len(before) :].encode()

    def _prepared(self, text: str | Pair) -> str | tuple[str, str]:
        """A text as sentence-transformers gives it to a tokenizer."""
        if isinstance(text, Pair):
            return text.query.strip(), text.document.strip()
        return text.strip().lower() if self._lowers_case else text.strip()

    def _next_tokens(self, encoded: Iterator[Any], each: Input) -> Tokens:
        if not isinstance(each, str | Pair):
            return Tokens(each)
        encoding = next(encoded)
        return Tokens(encoding.ids, encoding.type_ids if isinstance(each, Pair) and self.has_types else ())


class _Pass(NamedTuple):
    """A forward pass."""

    indexes: Sequence[int]
    """Of its texts, in their batch."""
    features: dict[str, Any]
    """What the model is to read."""


class _Batch(NamedTuple):
    texts: Sequence[Tokens]
    passes: Sequence[_Pass]


class ForwardPasses:
    """A model, as infinity-emb's threads use it: batches of tokens in, a row for each text out.

    Where a forward pass fails, the rows of its texts are not numbers. An error would end the thread, and
    leave everybody waiting for ever.
    """

    def __init__(
        self,
        model: Any,
        reader: TextReader,
        cores: Cores,
        *,
        batch_tokens: int,
        pass_tokens: int,
        is_on_cpu: bool,
    ) -> None:
        """
        Args:
            batch_tokens, pass_tokens: `most_tokens` and `pass_tokens` of `split`.
        """
        self.capabilities = model.capabilities
        self.count = 0
        """Forward passes that have ended."""
        self._model = model
        self._reader = reader
        self._batch_tokens = batch_tokens
        self._pass_tokens = pass_tokens
        self._cores = cores
        self._is_on_cpu = is_on_cpu
        self._threads: dict[int, ThreadPoolExecutor] = {}
        """By how many they are."""
        self._torch = import_module("torch")
        self._no_row: NDArray[np.float32] = np.array(np.nan, dtype=np.float32)

    def encode_pre(self, batch: Sequence[Tokens | tuple[str, Tokens]]) -> _Batch:
        texts = [each if isinstance(each, Tokens) else each[1] for each in batch]
        wanted = [index for index, text in enumerate(texts) if not text.is_given_up]
        lengths = [len(texts[index]) for index in wanted]
        parts = split(lengths, self._batch_tokens, self._pass_tokens)
        if self._is_on_cpu:
            parts = divide(parts, lengths, _PASSES_OF_A_CORE * self._cores.threads(), self._pass_tokens)
        return _Batch(texts, [self._pass_of(texts, [wanted[place] for place in part]) for part in parts])

    def encode_core(self, batch: _Batch) -> list[NDArray[np.float32]]:
        """A row for each text of the batch: its vector, or its score."""
        rows = [self._no_row] * len(batch.texts)
        passes = [
            each for each in batch.passes if not all(batch.texts[index].is_given_up for index in each.indexes)
        ]
        self._cores.begin_work()
        try:
            for each, computed in zip(passes, self._compute_all(passes), strict=True):
                self.count += 1
                for index, row in zip(each.indexes, computed, strict=True):
                    rows[index] = row
        finally:
            self._cores.end_work()
        return rows

    def _compute_all(self, passes: Sequence[_Pass]) -> Iterator[list[NDArray[np.float32]]]:
        """The rows of each pass.

        On several cores each computes a pass of its own: where they share one, all wait whenever one of them
        has something else to do, such as the gateway's work.
        """
        threads = self._cores.threads() if self._is_on_cpu else 1
        if threads == 1 or len(passes) < threads:
            return (self._compute(each, threads=threads) for each in passes)
        if threads not in self._threads:
            self._threads[threads] = ThreadPoolExecutor(threads, thread_name_prefix="forward-passes")
        return self._threads[threads].map(partial(self._compute, threads=1), passes)

    def encode_post(self, rows: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        return rows

    def compute(self, texts: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        return self.encode_core(self.encode_pre(texts))

    def features(self, texts: Sequence[Tokens]) -> dict[str, Any]:
        """Tensors of the shape (texts, tokens of the longest one)."""
        shape = len(texts), max(map(len, texts))
        ids = np.full(shape, self._reader.pad_token_id, dtype=np.int64)
        mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, text in enumerate(texts):
            place = slice(-len(text), None) if self._reader.pads_left else slice(len(text))
            ids[row, place], mask[row, place] = text.ids, 1
            if text.type_ids:
                types[row, place] = text.type_ids
        features = {"input_ids": ids, "attention_mask": mask}
        if self._reader.has_types:
            features["token_type_ids"] = types
        return {name: self._torch.from_numpy(values) for name, values in features.items()}

    def _pass_of(self, texts: Sequence[Tokens], indexes: Sequence[int]) -> _Pass:
        return _Pass(indexes, self.features([texts[index] for index in indexes]))

    def _compute(self, one: _Pass, *, threads: int) -> list[NDArray[np.float32]]:
        try:
            if self._is_on_cpu:
                self._use_threads(threads)
            rows = list(self._model.encode_post(self._model.encode_core(one.features)))
            self._no_row = np.full_like(rows[0], np.nan)
        except Exception:
            logger.exception("A forward pass of %d texts failed.", len(one.indexes))
            return [self._no_row] * len(one.indexes)
        else:
            return rows

    def _use_threads(self, threads: int) -> None:
        # Each thread has a number of its own, and setting it throws prepared kernels away.
        if self._torch.get_num_threads() != threads:
            self._torch.set_num_threads(threads)


def _characters(each: Input) -> int:
    """Of a text or a pair; ids have none, as they are not cut up."""
    if isinstance(each, Pair):
        return len(each.query) + len(each.document)
    return len(each) if isinstance(each, str) else 0


def split(lengths: Sequence[int], most_tokens: int, pass_tokens: int) -> list[list[int]]:
    """Divide texts into forward passes, each padded to its longest text, so that the least is computed.

    Args:
        lengths: tokens of each text.
        most_tokens: of one pass, with padding. A text that has more is alone.
        pass_tokens: as many tokens take as long as it takes to begin one more pass.

    Returns:
        Indexes of the texts of each pass.
    """
    order = np.argsort(lengths, kind="stable")
    # What it costs at least to compute the texts up to each one, and where the last of these passes begins.
    costs, begins = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
    for end in range(1, len(order) + 1):
        tokens = np.arange(end, 0, -1) * lengths[order[end - 1]]
        fits = tokens <= most_tokens
        fits[-1] = True
        totals = np.where(fits, costs[:end] + tokens + pass_tokens, np.inf)
        begins[end] = totals.argmin()
        costs[end] = totals[begins[end]]
    parts = []
    end = len(order)
    while end:
        parts.append(order[begins[end] : end].tolist())
        end = begins[end]
    return parts


def divide(
    parts: Sequence[list[int]], lengths: Sequence[int], count: int, pass_tokens: int
) -> list[list[int]]:
    """Halve the largest forward passes until there are `count`, as far as they are large.

    Args:
        parts: the indexes of the texts of each pass, from `split`.
        lengths: tokens of each text.
        pass_tokens: as in `split`; a pass of fewer tokens than twice that stays whole.

    Returns:
        The indexes of the texts of each pass, the largest pass first.
    """

    def tokens(part: Sequence[int]) -> int:
        return len(part) * max(lengths[index] for index in part)

    divided = sorted(parts, key=tokens, reverse=True)
    while 0 < len(divided) < count and len(divided[0]) > 1 and tokens(divided[0]) >= 2 * pass_tokens:
        largest = divided.pop(0)
        middle = len(largest) // 2
        divided = sorted([*divided, largest[:middle], largest[middle:]], key=tokens, reverse=True)
    return divided


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(f"{path} has no config.json that can be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelLoadFailed(f"{path}: config.json is no object.")
    return config


def _check_modules(path: Path) -> None:
    """
    Raises:
        ModelLoadFailed: the folder names Python code that is not sentence-transformers' own.
    """
    modules_file = path / "modules.json"
    if not modules_file.exists():
        return
    try:
        types = [str(module["type"]) for module in json.loads(modules_file.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadFailed(f"{modules_file} cannot be read: {error!r}") from error
    foreign = [each for each in types if not each.startswith("sentence_transformers.models.")]
    if foreign:
        raise ModelLoadFailed(
            f"The model needs Python code beside its weights: {', '.join(foreign)}. If you trust it, set"
            " `backend_extra_args.trust_remote_code`."
        )


def _import_libraries() -> tuple[Any, Any]:
    """infinity-emb and torch, without network, telemetry, or changes of what is logged.

    Raises:
        MissingExtra: they are not installed.
    """
    for name in [name for name in os.environ if name.startswith("INFINITY_")]:
        del os.environ[name]
    os.environ.update(_ENVIRONMENT)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    # It makes a folder where it is started, unless it is told where else.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INFINITY_HOME"] = folder
        try:
            infinity, torch = import_module("infinity_emb"), import_module("torch")
        except ModuleNotFoundError as error:
            raise MissingExtra(
                "The embedding backend needs infinity-emb, in an environment of its own: gallama setup"
                f" embedding. What is missing is {error.name}."
            ) from error
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    import_module("transformers.utils.logging").set_verbosity_error()
    # infinity-emb trades exactness for speed; those who want that ask for another `dtype`.
    torch.backends.cuda.matmul.allow_tf32 = False
    return infinity, torch


def _choose_device(spec: ModelSpec, options: InfinityOptions, torch: Any) -> str:
    """
    Raises:
        InvalidConfig: torch does not see what the spec asks for.
    """
    seen = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    asks_for_gpu = not isinstance(spec.gpus, str) and any(spec.gpus)
    if options.device == "auto":
        chosen = next(device for device, is_seen in seen.items() if is_seen)
        if asks_for_gpu and chosen == "cpu":
            raise InvalidConfig("`gpus` asks for a GPU, but torch sees none. Leave it out to use the CPU.")
        return chosen
    if not seen[options.device]:
        raise InvalidConfig(f"`backend_extra_args.device` is {options.device}, which torch does not see.")
    if asks_for_gpu and options.device == "cpu":
        raise InvalidConfig("`gpus` asks for a GPU, but `backend_extra_args.device` is cpu; leave one out.")
    return options.device


def _replicas(spec: ModelSpec) -> int:
    """On how many GPUs the model is, as a whole on each."""
    return 1 if isinstance(spec.gpus, str) else sum(size > 0 for size in spec.gpus)


def _choose_dtype(options: InfinityOptions, device: str, config: Mapping[str, Any]) -> str:
    """On a GPU that of the model's weights: what they do not hold cannot be lost."""
    if options.dtype != "auto":
        return options.dtype
    stored = config.get("dtype") or config.get("torch_dtype")
    return str(stored) if device != "cpu" and stored in _DTYPES else "float32"


def _ranks(model: Any) -> bool:
    """
    Raises:
        ModelLoadFailed: the model neither embeds nor ranks.
    """
    capabilities: set[str] = model.capabilities
    if capabilities == {"rerank"}:
        return True
    if capabilities != {"embed"} or model.mode_colbert:
        does = (
            "makes a vector of each token" if "embed" in capabilities else f"is for {', '.join(capabilities)}"
        )
        raise ModelLoadFailed(
            f"The model {does}; the embedding backend takes those that embed or rank texts."
        )
    return False


def _default_prompt(model: Any) -> str:
    """What the model's own library puts in front of each text.

    Raises:
        ModelLoadFailed: it is to be read, but not to count; that is not done here.
    """
    name = None if _ranks(model) else model.default_prompt_name
    if name is None:
        return ""
    if any(getattr(module, "include_prompt", True) is False for module in model):
        raise ModelLoadFailed(
            "The model leaves its prompt out of its vectors, which this backend does not do."
        )
    return str(model.prompts[name])


def _own_context_length(model: Any, config: Mapping[str, Any]) -> int:
    """Tokens that the model says to take.

    Raises:
        InvalidConfig: it does not say so.
    """
    said = None if _ranks(model) else model.max_seq_length
    lengths = [said] if said else [config.get("max_position_embeddings"), model.tokenizer.model_max_length]
    # Tokenizers without a limit have a number that no machine can hold.
    known = [length for length in lengths if isinstance(length, int) and 0 < length < 2**30]
    if not known:
        raise InvalidConfig("The model does not say how many tokens it takes; set `max_seq_len`.")
    return min(known)


def _shorter_dimensions(
    options: InfinityOptions, config: Mapping[str, Any], dimensions: int
) -> Literal["any"] | tuple[int, ...]:
    """
    Raises:
        InvalidConfig: `backend_extra_args` has numbers that are no shorter ones.
    """
    asked = options.matryoshka_dimensions
    if asked is None:
        told = config.get("matryoshka_dimensions") or ()
        if not told and config.get("is_matryoshka") is True and dimensions:
            return "any"
        return tuple(each for each in told if isinstance(each, int) and 0 < each < dimensions)
    if isinstance(asked, str):
        return "any"
    if any(each > dimensions for each in asked):
        raise InvalidConfig(
            f"`backend_extra_args.matryoshka_dimensions` has {max(asked)}; the vectors have {dimensions}."
        )
    return asked


def _byte_level(tokenizer: Any) -> dict[str, int]:
    """The byte of each character of a tokenizer that writes bytes as characters; {} for others."""
    if "ByteLevel" not in repr(tokenizer.decoder):
        return {}
    to_characters = import_module("transformers.models.gpt2.tokenization_gpt2").bytes_to_unicode()
    return {character: byte for byte, character in to_characters.items()}


def _field(name: str) -> str:
    return name.partition("[")[0]
