"""Models in EXL3 folders, and unquantized ones, through exllamav3's generator."""

from __future__ import annotations

from pathlib import Path

from gallama.catalog.model_files import quantization_of
from gallama.config import ModelSpec
from gallama.engines import ignore_progress
from gallama.engines.cuda_extension import import_with_extension
from gallama.engines.exllamav3.options import read_options
from gallama.engines.generators.engine import GeneratorEngine
from gallama.engines.tokenizer_folder import read_folder_tokens
from gallama.errors import InvalidConfig
from gallama.generation import ReportProgress

# FP8 and MXFP4 become FP16 when they are loaded.
_LOADED_FROM = ("exl3", "fp8", "mxfp4")


def load(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> GeneratorEngine:
    """Load a folder and compute a first token with it. Blocks for as long as that takes.

    Raises:
        InvalidConfig: the spec asks for what the model, the library or the machine cannot do.
        MissingExtra: the library, or its CUDA extension, is not there.
        ModelLoadFailed: the folder holds no model that the library runs.
        NotEnoughMemory: it does not fit the GPUs.
    """
    options = read_options(spec)
    _check_quantization("model_id", path)
    if spec.speculation == "draft":
        assert spec.draft_model_id is not None, "the spec has been validated"
        _check_quantization("draft_model_id", Path(spec.draft_model_id))
    tokens = read_folder_tokens(path, spec)
    import_with_extension("exllamav3")
    # Only now: they import the library.
    from gallama.engines.exllamav3.loading import load_generator

    return GeneratorEngine(
        tokens,
        lambda: load_generator(path, spec, options, tokens.vocabulary, report_progress),
        name="exllamav3",
    )


def _check_quantization(key: str, path: Path) -> None:
    """The library itself takes note of tensors' names only, and tells late."""
    method = quantization_of(path)
    if method is None or method in _LOADED_FROM:
        return
    way_out = (
        "Use `backend=exllamav2` for it." if method in ("exl2", "gptq") else "Name an EXL3 folder instead."
    )
    raise InvalidConfig(
        f"`{key}`: the weights in {path} are quantized as {method}; exllamav3 loads EXL3 and unquantized"
        f" ones. {way_out}"
    )
