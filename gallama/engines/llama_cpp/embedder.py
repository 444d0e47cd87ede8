"""Models in GGUF files that make vectors of texts or rank them, through llama.cpp."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from gallama.config import ModelSpec
from gallama.embedding import EmbeddedTexts, RankedTexts
from gallama.engines import ignore_progress
from gallama.engines.extra_arguments import read_extra_arguments
from gallama.engines.llama_cpp import bindings
from gallama.engines.llama_cpp.loading import load_model
from gallama.engines.llama_cpp.options import (
    EmbedderOptions,
    choose_cores,
    embedder_context_options,
)
from gallama.engines.llama_cpp.text_batches import TextBatches
from gallama.engines.llama_cpp.text_vectors import TextVectors
from gallama.engines.text_limits import check_characters, reading_parts
from gallama.errors import (
    EngineFailed,
    InvalidConfig,
    InvalidRequest,
    TextTooLong,
    UnsupportedValue,
    WorkerUnavailable,
)
from gallama.generation import EngineStatus, ReportProgress

# Texts of one batch. With 8 tokens each, as questions have them, so many fill one of 512.
_BATCH_TEXTS = 64

# The longest text, unless `max_seq_len` says otherwise: OpenAI's models take so much. The cache of some small
# models would take several times their own memory for the length that they were trained for.
_USUAL_TOKENS = 8192

# The same where logits are made of all tokens on the way: half a gigabyte for so many.
_USUAL_TOKENS_WITH_LOGITS = 1024

_SOME_TOKEN = 0

# Their classifiers' numbers are probabilities already: of "yes", and of "no".
_RANK_BY_PROBABILITY = ("qwen3", "qwen3vl")

T = TypeVar("T")
PairTokens = Callable[[str, str], list[int]]
"""The token ids that rank a document, from the query and the document."""


def load(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> LlamaCppEmbedder:
    """Load a GGUF file and compute a first vector with it. Blocks for as long as that takes.

    Raises:
        InvalidConfig: the spec asks for what the model, this build or this engine cannot do.
        ModelLoadFailed: llama.cpp refused the file, or there is too little memory.
    """
    options = read_extra_arguments(EmbedderOptions, spec, backend="llama_cpp")
    return load_model(
        path,
        spec,
        options,
        report_progress,
        lambda model, opened: LlamaCppEmbedder(model, opened, spec, options),
    )


class LlamaCppEmbedder:
    """A GGUF model with the thread that computes; see `embedding.Embedder`."""

    def __init__(
        self, model: bindings.NativeModel, opened: ExitStack, spec: ModelSpec, options: EmbedderOptions
    ) -> None:
        """
        Args:
            opened: takes what is to be closed at the end.
        """
        self._opened = opened
        self._model = model
        way = choose_way(model, spec, options)
        self.context_length = way.context_length
        self._pair_tokens = pair_tokens(model) if way.pooling == "rank" else None
        self._width = model.classes if way.pooling == "rank" else model.dimensions
        self.dimensions = 0 if way.pooling == "rank" else model.dimensions
        self.shorter_dimensions = _choose_shorter(options, self.dimensions)
        context = bindings.NativeContext(model, _to_context_options(way, options))
        opened.callback(context.close)
        vectors = TextVectors(
            context, width=self._width, batch_tokens=options.n_batch, by_last_token=way.by_last_token
        )
        self._batches = TextBatches(
            vectors,
            batch_tokens=options.n_batch,
            batch_texts=_BATCH_TEXTS,
            cores=choose_cores(spec, options),
            set_threads=lambda threads: context.set_threads(threads, threads),
        )
        self._is_closing = False
        self._reading = threading.Lock()
        """Held by threads that ask the model about tokens: it must not be closed meanwhile."""
        self._batches.start()
        opened.callback(self._batches.close)
        # Touches all weights, so that the first request does not wait for the disk.
        self._batches.submit([[_SOME_TOKEN]]).result()

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._open_model() as model:
            return model.tokenize(
                text.encode(), parse_control_tokens=True, add_special_tokens=add_special_tokens
            )

    def token_texts(self, token_ids: Sequence[int]) -> list[bytes]:
        self._check_token_ids(token_ids, "tokens")
        with self._open_model() as model:
            return list(model.token_texts(token_ids))

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> EmbeddedTexts:
        if self._pair_tokens is not None:
            raise UnsupportedValue("The model only ranks: ask it at /v1/rerank.", param="model")
        characters = [len(each) if isinstance(each, str) else 0 for each in inputs]
        texts = await self._read(self._read_input, inputs, characters)
        rows = await self._compute(texts)
        return EmbeddedTexts(vectors=_unit_rows(rows), tokens=sum(map(len, texts)))

    async def rerank(self, query: str, documents: Sequence[str]) -> RankedTexts:
        if self._pair_tokens is None:
            raise UnsupportedValue("The model does not rank: it makes vectors of texts.", param="model")
        characters = [len(query) + len(document) for document in documents]
        read_pair = partial(self._read_pair, self._pair_tokens, query)
        texts = await self._read(read_pair, documents, characters)
        rows = await self._compute(texts)
        return RankedTexts(scores=self._scores(rows), tokens=sum(map(len, texts)))

    def status(self) -> EngineStatus:
        return self._batches.status()

    async def probe(self) -> None:
        await self._compute([[_SOME_TOKEN]])

    async def close(self) -> None:
        self._is_closing = True
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._reading:
            self._opened.close()

    @contextlib.contextmanager
    def _open_model(self) -> Iterator[bindings.NativeModel]:
        """
        Raises:
            WorkerUnavailable: it is closed, or will be.
        """
        with self._reading:
            if self._is_closing:
                raise WorkerUnavailable("The model is being unloaded.")
            yield self._model

    async def _compute(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """What the model makes of each text, shape (texts, width)."""
        if self._is_closing:
            raise WorkerUnavailable("The model is being unloaded.")
        if not texts:
            return np.zeros((0, self._width), dtype=np.float32)
        return await asyncio.wrap_future(self._batches.submit(texts))

    async def _read(
        self, read_one: Callable[[int, T], list[int]], inputs: Sequence[T], characters: Sequence[int]
    ) -> list[list[int]]:
        """The token ids of each input, from its index and itself.

        Args:
            characters: of each input.

        Raises:
            GallamaError: as `read_one`.
        """

        def read_part(indexes: range) -> list[list[int]]:
            return [read_one(index, inputs[index]) for index in indexes]

        texts: list[list[int]] = []
        for indexes in reading_parts(characters):
            texts += await asyncio.to_thread(read_part, indexes)
        return texts

    def _read_input(self, index: int, given: str | Sequence[int]) -> list[int]:
        name = f"input[{index}]"
        if isinstance(given, str):
            self._check_characters(len(given), name, "input")
            token_ids = self.tokenize(given, add_special_tokens=True)
        else:
            self._check_token_ids(given, name)
            token_ids = list(given)
        self._check_length(token_ids, name, "input")
        return token_ids

    def _read_pair(self, tokens_of: PairTokens, query: str, index: int, document: str) -> list[int]:
        name = f"documents[{index}]"
        self._check_characters(len(query) + len(document), name, "documents", "with the query ")
        with self._open_model():
            token_ids = tokens_of(query, document)
        self._check_length(token_ids, name, "documents", "with the query ")
        return token_ids

    def _check_characters(self, characters: int, name: str, param: str, with_what: str = "") -> None:
        check_characters(
            characters, name, context_length=self.context_length, param=param, with_what=with_what
        )

    def _check_token_ids(self, token_ids: Sequence[int], name: str) -> None:
        size = self._model.vocabulary_size
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < size:
                raise InvalidRequest(
                    f"`{name}[{index}]` is {token_id}; this model has the tokens 0 to {size - 1}.",
                    param=name.partition("[")[0],
                )

    def _check_length(self, token_ids: Sequence[int], name: str, param: str, with_what: str = "") -> None:
        if not token_ids:
            raise InvalidRequest(f"`{name}` has no tokens; send a text that has some.", param=param)
        if len(token_ids) > self.context_length:
            raise TextTooLong(
                f"`{name}` has {with_what}{len(token_ids)} tokens; the model takes {self.context_length}.",
                param=param,
            )

    def _scores(self, rows: NDArray[np.float32]) -> list[float]:
        """The classifier's first number of each row, as 0 to 1."""
        first = rows[:, 0].astype(np.float64)
        if self._model.architecture not in _RANK_BY_PROBABILITY:
            first = (1 + np.tanh(first / 2)) / 2  # the logistic function, which cannot overflow so
        return [float(score) for score in first]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a model makes vectors."""

    pooling: str
    """One of `bindings.POOLINGS`."""
    by_last_token: bool
    """Whether a text may be read in pieces, as only its last token counts and that has seen all others."""
    context_length: int


def choose_way(model: bindings.NativeModel, spec: ModelSpec, options: EmbedderOptions) -> Way:
    """
    Raises:
        InvalidConfig: the model cannot do what the spec asks for, or makes no vectors.
    """
    if model.has_encoder:
        raise InvalidConfig(f"Models of the kind {model.architecture} make no vectors with this backend.")
    is_causal, has_cache = _look_at(model, options)
    pooling = options.pooling or model.pooling or ("last" if is_causal else "mean")
    if pooling == "rank":
        _check_ranks(model)
    by_last_token = is_causal and has_cache and pooling in ("last", "rank")
    usual = _USUAL_TOKENS_WITH_LOGITS if has_cache and not by_last_token else _USUAL_TOKENS
    if not is_causal and (spec.max_seq_len or 0) > model.trained_context_length:
        raise InvalidConfig(
            f"`max_seq_len` is {spec.max_seq_len}; the model has {model.trained_context_length} positions."
        )
    return Way(
        pooling=pooling,
        by_last_token=by_last_token,
        context_length=spec.max_seq_len or min(model.trained_context_length, usual),
    )


def _look_at(model: bindings.NativeModel, options: EmbedderOptions) -> tuple[bool, bool]:
    """Whether the model's tokens see only those before them, and whether they are kept in a cache.

    Some models' files say so and some models just are so; a context knows.
    """
    context = bindings.NativeContext(model, embedder_context_options(options, batch_tokens=32))
    try:
        return context.is_causal, context.has_cache
    finally:
        context.close()


def _check_ranks(model: bindings.NativeModel) -> None:
    if not model.has_classifier:
        raise InvalidConfig(
            "`backend_extra_args.pooling` is rank, but the model has no classifier to do so; leave it out."
        )
    if model.classes != 1 and model.architecture not in _RANK_BY_PROBABILITY:
        raise InvalidConfig(f"The model sorts texts into {model.classes} classes, which is no ranking.")


def _to_context_options(way: Way, options: EmbedderOptions) -> bindings.ContextOptions:
    batch_tokens = options.n_batch if way.by_last_token else max(options.n_batch, way.context_length)
    return embedder_context_options(
        options,
        pooling=way.pooling,
        sequences=_BATCH_TEXTS,
        cells=max(options.n_batch, way.context_length),
        batch_tokens=batch_tokens,
        outputs=_BATCH_TEXTS if way.by_last_token else batch_tokens,
    )


def _choose_shorter(options: EmbedderOptions, dimensions: int) -> Literal["any"] | tuple[int, ...]:
    """
    Raises:
        InvalidConfig: the model's vectors are not so long.
    """
    wanted = options.matryoshka_dimensions
    if wanted and not dimensions:
        raise InvalidConfig(
            "`backend_extra_args.matryoshka_dimensions`: the model ranks and makes no vectors."
        )
    if wanted != "any" and max(wanted, default=0) > dimensions:
        raise InvalidConfig(
            f"`backend_extra_args.matryoshka_dimensions` has {max(wanted)}; the model's vectors have"
            f" {dimensions}."
        )
    return wanted


def pair_tokens(model: bindings.NativeModel) -> PairTokens:
    """How the model wants a query and a document to be put together.

    What a client has written never becomes a control token.
    """
    template = model.rerank_template
    return _framed_pair(model) if template is None else _templated_pair(model, template)


def _framed_pair(model: bindings.NativeModel) -> PairTokens:
    frame = model.pair_frame

    def tokens(query: str, document: str) -> list[int]:
        texts = [model.tokenize(text.encode(), parse_control_tokens=False) for text in (query, document)]
        return [*frame.start, *texts[0], *frame.between, *texts[1], *frame.end]

    return tokens


def _templated_pair(model: bindings.NativeModel, template: str) -> PairTokens:
    """Cut at the template's own control tokens, so that those in a client's text are not recognised."""
    control_tokens = model.control_tokens
    names = sorted(map(re.escape, control_tokens), key=len, reverse=True)
    pieces = [piece for piece in re.split(f"({'|'.join(names)})", template) if piece] if names else [template]

    def tokens(query: str, document: str) -> list[int]:
        given = {"{query}": query, "{document}": document}
        token_ids: list[int] = []
        for piece in pieces:
            if piece in control_tokens:
                token_ids.append(control_tokens[piece])
                continue
            # Both in one go: a query may well have "{document}" in it.
            text = re.sub(r"\{(?:query|document)\}", lambda match: given[match[0]], piece)
            token_ids += model.tokenize(text.encode(), parse_control_tokens=False)
        return token_ids

    return tokens


def _unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """
    Raises:
        EngineFailed: a row is all zeros, which has no direction.
    """
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not lengths.all():
        raise EngineFailed("The model has made a vector of nothing but zeros.")
    unit_rows: NDArray[np.float32] = (rows / lengths).astype(np.float32)
    return unit_rows
