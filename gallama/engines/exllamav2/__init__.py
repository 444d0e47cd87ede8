"""Models in EXL2 and GPTQ folders on NVIDIA GPUs, through exllamav2."""

from __future__ import annotations

from pathlib import Path

from gallama.config import ModelSpec
from gallama.engines import ignore_progress
from gallama.engines.draft_vocabulary import check_same_vocabulary
from gallama.engines.exllamav2.loading import import_library, load_models, naming
from gallama.engines.exllamav2.options import ExLlamaV2Options, read_options
from gallama.engines.generators.engine import GeneratorEngine
from gallama.engines.generators.thread import Generator
from gallama.engines.tokenizer_folder import FolderTokens, read_folder_tokens
from gallama.generation import ReportProgress

# Beside the weights there are a tokenizer to read and a first token to compute.
_PART_OF_WEIGHTS = 0.95


def load(spec: ModelSpec, path: Path, report_progress: ReportProgress = ignore_progress) -> GeneratorEngine:
    """Load a folder and compute a first token with it. Blocks for as long as that takes.

    Raises:
        InvalidConfig: the spec asks for what the model or the library cannot do.
        MissingExtra: the library is not there, or its extension cannot be compiled.
        ModelLoadFailed: the folder holds no model that the library runs.
        NotEnoughMemory: it does not fit the GPUs.
        EngineFailed: it computes no numbers.
    """
    options = read_options(spec)
    tokens = read_folder_tokens(path, spec)
    if spec.speculation == "draft" and spec.draft_model_id is not None:
        draft_tokens = read_folder_tokens(Path(spec.draft_model_id), spec)
        check_same_vocabulary(tokens.vocabulary, draft_tokens.vocabulary)
    return GeneratorEngine(
        tokens,
        lambda: _make_generator(spec, path, options, tokens, report_progress),
        name="exllamav2",
    )


def _make_generator(
    spec: ModelSpec,
    path: Path,
    options: ExLlamaV2Options,
    tokens: FolderTokens,
    report_progress: ReportProgress,
) -> Generator:
    import_library(options)
    # Only now: importing it imports the library.
    from gallama.engines.exllamav2.generator import PagedGenerator

    models = load_models(spec, path, options, lambda fraction: report_progress(_PART_OF_WEIGHTS * fraction))
    try:
        with naming(path):
            return PagedGenerator(models, tokens.vocabulary, step_seconds=options.prompt_step_ms / 1000)
    except BaseException:
        models.close()
        raise
