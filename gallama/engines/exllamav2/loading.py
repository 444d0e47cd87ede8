"""A folder, loaded by exllamav2. Nothing here imports the library before it may."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gallama.catalog.folder_sizes import stored_bytes
from gallama.catalog.model_files import gptq_bits, quantization_of, read_config
from gallama.config import ModelSpec
from gallama.engines.cuda_extension import import_with_extension
from gallama.engines.exllamav2.options import (
    ExLlamaV2Options,
    Placement,
    Rotations,
    Sizes,
    choose_sizes,
    place,
    split_by_hand,
    split_of_layers,
)
from gallama.engines.generators.settings import check_draft_cache
from gallama.errors import GallamaError, InvalidConfig, ModelLoadFailed, NotEnoughMemory
from gallama.generation import ReportProgress

logger = logging.getLogger(__name__)

_LIBRARY = "exllamav2"
_NO_FLASH_ATTENTION = "EXLLAMA_NO_FLASH_ATTN"
# The first generation of GPUs that flash-attn computes on.
_AMPERE = (8, 0)
_BITS_OF_GPTQ = 4
_OUT_OF_MEMORY = ("out of memory", "Insufficient VRAM", "Insufficient space in device allocation")
# Heads of other lengths have no whole number of scales in a quantized cache.
_SCALED_TOGETHER = 32


@dataclass(slots=True, kw_only=True)
class Models:
    """A model with its cache, and the small one that drafts for it."""

    model: Any
    cache: Any
    sizes: Sizes
    is_paged: bool
    """Whether several texts can be computed side by side."""
    is_tensor_parallel: bool = False
    draft_model: Any = None
    draft_cache: Any = None
    guesses_ngrams: bool = False

    def logits_without_cache(self, token_id: int) -> NDArray[np.float32]:
        """What the model says after one token, shape (padded vocabulary,)."""
        logits = self.model.forward(torch.tensor([[token_id]], dtype=torch.long), cache=None)
        row: NDArray[np.float32] = logits[0, -1].float().cpu().numpy()
        return row

    def wait(self) -> None:
        """Until the GPUs have computed what they were told to.

        Raises:
            Whatever broke there.
        """
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)

    def free_unused(self) -> None:
        """Give back what nobody holds any more.

        Raises:
            Whatever CUDA raises once it computes nothing more in this process.
        """
        gc.collect()
        self.wait()
        torch.cuda.empty_cache()

    def close(self) -> None:
        """Unload, though parts may not be loaded."""
        self.cache = self.draft_cache = None
        for model in (self.model, self.draft_model):
            if model is not None:
                _unload(model)
        self.model = self.draft_model = None
        gc.collect()
        torch.cuda.empty_cache()


def import_library(options: ExLlamaV2Options) -> None:
    """Import exllamav2, so that it finds what it may use.

    Raises:
        ModuleNotFoundError: it is not installed.
        InvalidConfig: there is no GPU to compute on.
        MissingExtra: it cannot be compiled.
    """
    if not options.flash_attn or _lacks_flash_attention():
        os.environ[_NO_FLASH_ATTENTION] = "1"
    with prints_in_log():
        import_with_extension(_LIBRARY)


def _lacks_flash_attention() -> bool:
    """Whether flash-attn would fail here: on older GPUs, or because it was built for another torch."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    if any(torch.cuda.get_device_capability(index) < _AMPERE for index in gpus):
        logger.warning("flash-attn is not used: a GPU is older than what it computes on")
        return True
    try:
        import_module("flash_attn")
    except ModuleNotFoundError:
        return False  # the library sees that by itself
    except Exception as error:
        logger.warning("flash-attn is not used: it cannot be imported: %s", error)
        return True
    return False


def load_models(
    spec: ModelSpec, path: Path, options: ExLlamaV2Options, report_progress: ReportProgress
) -> Models:
    """Load a folder, and that of the draft model. To be called where the models then are computed.

    Raises:
        InvalidConfig: the spec asks for what the model or the library cannot do.
        ModelLoadFailed: the folder holds no model that the library runs.
        NotEnoughMemory: it does not fit the GPUs.
    """
    draft_path = Path(spec.draft_model_id) if spec.draft_model_id and spec.speculation == "draft" else None
    config = read_library_config(path, options)
    draft_config = None if draft_path is None else read_library_config(draft_path, options)
    configs = [config] if draft_config is None else [config, draft_config]
    is_paged = _can_page(configs)
    sizes = choose_sizes(spec, options, rotations(config), paged=is_paged)
    check_draft_cache(spec, context_length=sizes.context_length, backend="exllamav2")
    for each in configs:
        _apply(sizes, each)
    if spec.tp:
        check_tensor_parallel(config, quantization_of(path), is_paged=is_paged)
    models = Models(
        model=None,
        cache=None,
        sizes=sizes,
        is_paged=is_paged,
        is_tensor_parallel=spec.tp,
        guesses_ngrams=spec.speculation == "ngram",
    )
    try:
        _load_all(models, config, draft_config, spec, report_progress)
    except BaseException:
        models.close()
        raise
    return models


def read_library_config(path: Path, options: ExLlamaV2Options) -> Any:
    """What the library makes of a folder's config.json and the names of its tensors.

    Raises:
        ModelLoadFailed: it cannot load that, or would not as it is meant.
    """
    import exllamav2

    check_weights(path)
    config = exllamav2.ExLlamaV2Config()
    config.model_dir = str(path)
    with naming(path), prints_in_log():
        config.prepare()
    if config.architecture != config.arch.arch_string:
        raise ModelLoadFailed(
            f"{path} is a {config.architecture}, which exllamav2 does not know; it would load it as a Llama."
        )
    apply_rope_parameters(config, read_config(path), path)
    config.scale_pos_emb = options.rope_scale or config.scale_pos_emb
    config.scale_alpha_value = options.rope_alpha or config.scale_alpha_value
    config.no_flash_attn = config.no_flash_attn or not options.flash_attn
    config.arch_compat_overrides(quiet=True)
    return config


def check_weights(path: Path) -> None:
    """
    Raises:
        ModelLoadFailed: the weights are of a kind that the library does not read, or would read wrongly.
    """
    method = quantization_of(path)
    is_known = method in (None, "exl2") or (method == "gptq" and gptq_bits(path) == _BITS_OF_GPTQ)
    if not is_known:
        way_out = "use backend=exllamav3" if method == "exl3" else "leave `backend` out"
        raise ModelLoadFailed(
            f"{path} holds {str(method).upper()} weights; exllamav2 reads EXL2, GPTQ of 4 bits and those that"
            f" are not quantized. For this one, {way_out}."
        )


def apply_rope_parameters(config: Any, described: Mapping[str, Any], path: Path) -> None:
    """Tell the library what transformers 5 writes about positions in another place than it looks in.

    Args:
        described: the folder's config.json.

    Raises:
        ModelLoadFailed: it could not compute that.
    """
    text = described.get("text_config")
    rope = described.get("rope_parameters") or (text or {}).get("rope_parameters")
    if not rope:
        return
    kind = rope.get("rope_type", "default") if isinstance(rope, Mapping) else None
    if kind not in _READ_ROPE or any(isinstance(value, Mapping) for value in rope.values()):
        raise ModelLoadFailed(
            f"{path / 'config.json'} has `rope_parameters` that exllamav2 cannot compute. Use another"
            " backend, or a folder that was saved with transformers 4."
        )
    config.rotary_embedding_base = float(rope.get("rope_theta", config.rotary_embedding_base))
    config.partial_rotary_factor = float(rope.get("partial_rotary_factor", config.partial_rotary_factor))
    with naming(path):
        _READ_ROPE[kind](config, rope, described)


def _read_linear(config: Any, rope: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    config.scale_pos_emb = float(rope["factor"])


def _read_llama3(config: Any, rope: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    config.alt_rope_method = "llama3"
    config.l3_rope_factor = rope["factor"]
    config.l3_rope_low_freq_factor = rope["low_freq_factor"]
    config.l3_rope_high_freq_factor = rope["high_freq_factor"]
    config.l3_rope_original_max_position_embeddings = rope["original_max_position_embeddings"]


def _read_yarn(config: Any, rope: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    config.alt_rope_method = "yarn"
    config.yarn_rope_factor = rope["factor"]
    config.yarn_rope_original_max_position_embeddings = rope["original_max_position_embeddings"]


def _read_longrope(config: Any, rope: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    config.alt_rope_method = "su"
    config.scale_long_factor = rope["long_factor"]
    config.scale_short_factor = rope["short_factor"]
    original = "original_max_position_embeddings"
    config.original_max_seq_len = rope[original] if original in rope else described[original]


def _read_default(config: Any, rope: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    pass


_READ_ROPE: Mapping[str | None, Callable[[Any, Mapping[str, Any], Mapping[str, Any]], None]] = {
    "default": _read_default,
    "linear": _read_linear,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}


def rotations(config: Any) -> Rotations:
    """What a library's config says of the positions that its model knows."""
    trained = int(config.max_seq_len)
    if config.alt_rope_method == "yarn":
        stretched = int(config.yarn_rope_factor * config.yarn_rope_original_max_position_embeddings)
        return Rotations(trained_length=max(trained, stretched), is_yarn=True)
    if config.alt_rope_method == "su":
        return Rotations(trained_length=trained, short_length=int(config.original_max_seq_len))
    return Rotations(trained_length=trained)


def check_tensor_parallel(config: Any, quantization: str | None, *, is_paged: bool) -> None:
    """
    Raises:
        InvalidConfig: the library cannot split this model's layers over GPUs, or computes it wrongly then.
    """
    language = config.arch.lm
    problems = {
        f"not a {config.architecture}": not language.supports_tp,
        "EXL2 weights only": quantization != "exl2",
        "no experts": bool(config.num_experts and config.num_experts > 1),
        "no norms of queries and keys": bool(config.use_qk_norm),
        "no sliding window": bool(_sliding_window(config)),
        "an intermediate size that 128 divides": config.intermediate_size % 128 != 0,
        "flash-attn only": not is_paged,
    }
    problem = next((reason for reason, is_so in problems.items() if is_so), None)
    if problem is not None:
        raise InvalidConfig(
            f"`tp` is true, but tensor parallelism in exllamav2 knows {problem}. Leave it out: layers go onto"
            " the GPUs one after the other then."
        )


def check_sliding_window(config: Any, sizes: Sizes, *, is_paged: bool) -> None:
    """
    Raises:
        InvalidConfig: texts may be longer than what some layers see of them, which the library computes
            wrongly without flash-attn: it takes the last token's window for all tokens of a prompt.
    """
    window = _sliding_window(config)
    if not is_paged and window and sizes.context_length + sizes.drafts > window:
        raise InvalidConfig(
            f"`max_seq_len` is {sizes.context_length}, but layers of this model see {window} tokens, and"
            " without flash-attn exllamav2 computes longer texts wrongly. Add it by `gallama setup exllamav2"
            f" --with flash-attn`, or set `max_seq_len` to {window - sizes.drafts} at most."
        )


def _sliding_window(config: Any) -> int:
    """Tokens that some layers see; 0: all see the whole text."""
    language = config.arch.lm
    return int(config.sliding_window or 0) if language.swa or language.alternating_swa else 0


def _can_page(configs: Sequence[Any]) -> bool:
    import exllamav2.attn

    can = bool(exllamav2.attn.has_flash_attn_with_paged)
    is_paged = can and not any(config.no_flash_attn for config in configs)
    if not is_paged:
        logger.warning(
            "exllamav2 computes one request at a time: %s",
            "flash-attn is off, or does not compute this model" if can else "there is no flash-attn >= 2.5.7",
        )
    return is_paged


def _apply(sizes: Sizes, config: Any) -> None:
    config.max_seq_len = sizes.positions
    config.max_input_len = sizes.step
    config.max_output_len = sizes.slots * (1 + sizes.drafts)


def _load_all(
    models: Models, config: Any, draft_config: Any, spec: ModelSpec, report_progress: ReportProgress
) -> None:
    """Load the draft model first: it is small, and the other one takes what is left."""
    free = _free_bytes()
    draft_part = 0.0
    if draft_config is not None:
        weights = [stored_bytes(Path(each.model_dir)) for each in (draft_config, config)]
        draft_part = weights[0] / sum(weights)
        of_its_own = spec.draft_gpus is not None
        gpus = spec.draft_gpus if spec.draft_gpus is not None else spec.gpus
        where = place(
            "draft_gpus" if of_its_own else "gpus",
            gpus,
            reserve_gigabytes=spec.reserve_vram,
            free_bytes=free,
        )
        quant = spec.draft_cache_quant or spec.cache_quant or "FP16"
        loading = _Loading(draft_config, quant, models.sizes.cache, where, free)
        models.draft_model = loading.model
        models.draft_cache = loading.load(lambda fraction: report_progress(draft_part * fraction))
        # What is left of gigabytes that are for both is what the GPUs have free beside what is kept.
        free = _free_bytes() if of_its_own else free
    where = place("gpus", spec.gpus, reserve_gigabytes=spec.reserve_vram, free_bytes=free)
    loading = _Loading(config, spec.cache_quant or "FP16", models.sizes.cache, where, _free_bytes())
    models.model = loading.model
    models.cache = loading.load(
        lambda fraction: report_progress(draft_part + (1 - draft_part) * fraction),
        is_tensor_parallel=spec.tp,
    )


class _Loading:
    """A model with a cache of its own, about to be loaded."""

    def __init__(
        self,
        config: Any,
        cache_quant: str,
        cache_tokens: int,
        placement: Placement,
        free_bytes: Sequence[int],
    ) -> None:
        """
        Raises:
            InvalidConfig: the cache cannot be quantized.
        """
        import exllamav2

        if cache_quant != "FP16" and config.head_dim % _SCALED_TOGETHER:
            raise InvalidConfig(
                f"`cache_quant` is {cache_quant}, but the model has heads of {config.head_dim} numbers, and"
                f" exllamav2 quantizes {_SCALED_TOGETHER} together. Use FP16."
            )
        self._path = Path(config.model_dir)
        self._cache_kind = {
            "FP16": exllamav2.ExLlamaV2Cache,
            "Q8": exllamav2.ExLlamaV2Cache_Q8,
            "Q6": exllamav2.ExLlamaV2Cache_Q6,
            "Q4": exllamav2.ExLlamaV2Cache_Q4,
        }[cache_quant]
        self._cache_bits = {"FP16": 16.0, "Q8": 8.5, "Q6": 6.5, "Q4": 4.5}[cache_quant]
        self._cache_tokens = cache_tokens
        self._placement = placement
        self._free_bytes = free_bytes
        with naming(self._path), prints_in_log():
            self.model = exllamav2.ExLlamaV2(config)

    def load(self, report_progress: ReportProgress, *, is_tensor_parallel: bool = False) -> Any:
        """Load the weights, and make the cache, which is given back."""

        def report(module: int, modules: int) -> None:
            report_progress(module / modules)

        with naming(self._path), prints_in_log():
            if is_tensor_parallel:
                return self._load_split_layers(report)
            if self._placement.has_gap:
                return self._load_by_hand(report)
            cache = self._cache_kind(self.model, max_seq_len=self._cache_tokens, lazy=True)
            self.model.load_autosplit(cache, list(self._placement.reserve_bytes), callback=report)
            return cache

    def _load_by_hand(self, report: Callable[[int, int], None]) -> Any:
        """The library fills GPUs in order, and leaves none out, unless it is told what goes where."""
        config = self.model.config
        numbers = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        split = split_by_hand(
            self._placement,
            self._free_bytes,
            weight_bytes=stored_bytes(self._path),
            cache_bytes=int(numbers * self._cache_tokens * self._cache_bits / 8),
        )
        self.model.load(split, callback=report)
        return self._cache_kind(self.model, max_seq_len=self._cache_tokens)

    def _load_split_layers(self, report: Callable[[int, int], None]) -> Any:
        import exllamav2

        self.model.load_tp(
            split_of_layers(self._placement, self._free_bytes),
            callback=report,
            expect_cache_tokens=self._cache_tokens,
            expect_cache_base=self._cache_kind,
        )
        return exllamav2.ExLlamaV2Cache_TP(self.model, base=self._cache_kind, max_seq_len=self._cache_tokens)


def _free_bytes() -> list[int]:
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def _unload(model: Any) -> None:
    try:
        model.unload()
    except Exception as error:  # what was half loaded has parts that it does not expect to miss
        logger.debug("a model could not be unloaded in order: %s", error)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the library raises, whatever it is, as our error."""
    try:
        yield
    except GallamaError:
        raise
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        if type(error).__name__ == "OutOfMemoryError" or any(words in said for words in _OUT_OF_MEMORY):
            raise NotEnoughMemory(f"The GPUs have too little memory for {path}: {said}") from error
        raise ModelLoadFailed(f"exllamav2 could not load {path}: {said}") from error


@contextmanager
def prints_in_log() -> Iterator[None]:
    """What the library prints goes into the log."""
    with contextlib.redirect_stdout(_LogLines()):
        yield


class _LogLines(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logger.info("%s", line.strip())
        return len(text)
