"""A folder loaded onto GPUs, in the order that the library needs: caches before weights, drafts first."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from exllamav3 import Cache, CacheLayer_fp16, CacheLayer_quant, Config, Model, Tokenizer

from gallama.config import ModelSpec
from gallama.engines.draft_vocabulary import check_same_vocabulary
from gallama.engines.exllamav3.generator import ExLlamaV3Generator, GeneratorOptions, Models
from gallama.engines.exllamav3.options import (
    MOST_ROWS,
    CacheOptions,
    ExLlamaV3Options,
    cache_options,
    choose_context_length,
    draft_cache_options,
    placement,
    widest_draft,
)
from gallama.engines.tokenizer_folder import read_folder_tokens
from gallama.errors import GallamaError, InvalidConfig, ModelLoadFailed, NotEnoughMemory
from gallama.generation import ReportProgress, Vocabulary

logger = logging.getLogger(__name__)

# Parts of the whole: a draft model is small, and there are kernels to be tuned at the end.
_PART_OF_DRAFT = 0.1
_PART_OF_WEIGHTS = 0.9
# As wide as the steps are for which the library captures graphs.
_WARM_UP_ROWS = 8


def load_generator(
    path: Path,
    spec: ModelSpec,
    options: ExLlamaV3Options,
    vocabulary: Vocabulary,
    report_progress: ReportProgress,
) -> ExLlamaV3Generator:
    """Load the models, and compute a first token. Blocks for as long as that takes.

    What a failed load leaves on the GPUs is given back when the process ends.

    Raises:
        InvalidConfig: the spec asks for what the models, the library or the machine cannot do.
        ModelLoadFailed: a folder holds no model that the library runs, or it computes no numbers.
        NotEnoughMemory: the models do not fit the GPUs.
    """
    # The library prints what it has to say.
    with naming(path), contextlib.redirect_stdout(sys.stderr):
        return _Loading(path, spec, options, vocabulary, report_progress).load()


class _Loading:
    """What the steps of loading share."""

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        options: ExLlamaV3Options,
        vocabulary: Vocabulary,
        report_progress: ReportProgress,
    ) -> None:
        self._path = path
        self._spec = spec
        self._options = options
        self._vocabulary = vocabulary
        self._report_progress = report_progress

    def load(self) -> ExLlamaV3Generator:
        spec, options = self._spec, self._options
        config = Config.from_directory(str(self._path))
        length = choose_context_length(spec, config.max_position_embeddings)
        # Some models' positions have another meaning if texts may be long.
        config.override_dynamic_seq_len(length)
        model = Model.from_config(config)
        self._check_split(model)
        widest = widest_draft(spec, is_recurrent=bool(model.caps.get("recurrent_states")))
        for_cache = cache_options(spec, options, context_length=length, widest_draft=widest)
        cache = self._make_cache(model, for_cache, widest)
        draft_model, draft_cache = self._load_draft(for_cache, length)
        self._load_model(model, cache, draft_model, widest)
        self._warm_up(model, cache, widest, self._reported(_PART_OF_WEIGHTS, 1.0))
        generator = ExLlamaV3Generator(
            Models(
                model=model,
                cache=cache,
                tokenizer=Tokenizer.from_config(config),
                draft_model=draft_model,
                draft_cache=draft_cache,
            ),
            self._vocabulary,
            GeneratorOptions(
                slots=spec.max_concurrent_requests,
                context_length=length,
                ngram_match_min=options.ngram_match_min if spec.speculation == "ngram" else 0,
                draft_tokens=spec.most_draft_tokens,
                widest_draft=widest,
                chunk_tokens=options.max_chunk_size,
                step_seconds=options.prompt_step_ms / 1000,
            ),
        )
        generator.probe()
        self._report_progress(1.0)
        return generator

    def _check_split(self, model: Any) -> None:
        if self._spec.tp and not model.caps.get("supports_tp"):
            raise InvalidConfig(
                f"`tp` is true, but exllamav3 cannot split the layers of a {model.config.architecture}. Leave"
                " it out: whole layers go onto the GPUs then."
            )

    def _load_draft(self, for_cache: CacheOptions, context_length: int) -> tuple[Any, Any]:
        """The draft model and its cache; None, None: there is none."""
        spec = self._spec
        if spec.speculation != "draft":
            return None, None
        assert spec.draft_model_id is not None, "the spec has been validated"
        path = Path(spec.draft_model_id)
        for_draft_cache = draft_cache_options(spec, for_cache, context_length=context_length)
        check_same_vocabulary(self._vocabulary, read_folder_tokens(path, spec).vocabulary)
        with naming(path):
            config = Config.from_directory(str(path))
            config.override_dynamic_seq_len(context_length)
            model = Model.from_config(config)
            cache = self._make_cache(model, for_draft_cache, spec.most_draft_tokens)
            key, gigabytes = self._draft_gigabytes()
            logger.info("drafting with %s", spec.draft_model_name or path.name)
            model.load(
                **placement(key, gigabytes, reserve_gigabytes=spec.reserve_vram, free_bytes=_free_bytes()),
                max_chunk_size=self._measured_chunk(cache),
                max_output_size=spec.max_concurrent_requests,
                max_batch_size=spec.max_concurrent_requests,
                callback=self._reported(0.0, _PART_OF_DRAFT),
            )
            self._warm_up(model, cache, spec.most_draft_tokens)
        return model, cache

    def _draft_gigabytes(self) -> tuple[str, str | tuple[float, ...]]:
        """The key that says where the draft model goes, and its value."""
        if self._spec.draft_gpus is None:
            return "gpus", self._spec.gpus
        return "draft_gpus", self._spec.draft_gpus

    def _load_model(self, model: Any, cache: Any, draft_model: Any, widest: int) -> None:
        spec = self._spec
        shares_gigabytes = draft_model is not None and spec.draft_gpus is None
        rows = max(spec.max_concurrent_requests, MOST_ROWS if widest else 0)
        model.load(
            **placement(
                "gpus",
                spec.gpus,
                reserve_gigabytes=spec.reserve_vram,
                free_bytes=_free_bytes(),
                taken_bytes=_taken_bytes() if shares_gigabytes else None,
            ),
            tensor_p=spec.tp,
            tp_backend=self._options.tp_backend,
            max_chunk_size=self._measured_chunk(cache),
            max_output_size=rows,
            max_batch_size=spec.max_concurrent_requests,
            draft_model=draft_model,
            callback=self._reported(0.0 if draft_model is None else _PART_OF_DRAFT, _PART_OF_WEIGHTS),
        )

    def _measured_chunk(self, cache: Any) -> int:
        """So much of a text is computed to see what memory that takes, and it must fit the cache."""
        tokens: int = cache.max_num_tokens
        return min(self._options.max_chunk_size, tokens)

    def _make_cache(self, model: Any, options: CacheOptions, widest: int) -> Any:
        """
        Args:
            widest: tokens that may have to be taken back, which costs a recurrent model memory.
        """
        kind: dict[str, Any] = {"layer_type": CacheLayer_fp16}
        if options.bits is not None:
            kind = {"layer_type": CacheLayer_quant, "k_bits": options.bits[0], "v_bits": options.bits[1]}
        return Cache(
            model,
            max_num_tokens=options.tokens,
            max_batch_size=self._spec.max_concurrent_requests,
            max_history=widest if model.caps.get("recurrent_states") else 0,
            **kind,
        )

    def _warm_up(self, model: Any, cache: Any, widest: int, report: Any = None) -> None:
        """Compile and tune what the first requests would wait for otherwise."""
        if not self._options.warm_up:
            return
        failures = model.warmup(
            cache,
            max_chunk_size=self._options.max_chunk_size,
            max_batch_size=min(self._spec.max_concurrent_requests, _WARM_UP_ROWS),
            max_q_len=1 + widest,
            callback=report,
        )
        if failures:
            logger.warning("parts of the warm-up failed: %s", "; ".join(failures))

    def _reported(self, start: float, end: float) -> Any:
        def report(done: int, total: int) -> None:
            self._report_progress(start + (end - start) * done / max(1, total))

        return report


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the library raises, whatever it is, as our error."""
    try:
        yield
    except GallamaError:
        raise
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"There is too little memory on the GPUs for {path}: {error}") from error
    except Exception as error:
        if "Insufficient VRAM" in str(error):
            raise NotEnoughMemory(f"{path} and its cache do not fit the GPUs that they may use.") from error
        said = str(error) or type(error).__name__
        raise ModelLoadFailed(f"exllamav3 could not load {path}: {said}") from error


def _taken_bytes() -> list[int]:
    """By this process, on each GPU that it sees."""
    return [torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count())]


def _free_bytes() -> list[int]:
    """On each GPU that this process sees."""
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
