"""A GGUF file, loaded: for what writes with it and for what embeds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from gallama.config import ModelSpec
from gallama.engines.llama_cpp import bindings
from gallama.engines.llama_cpp.options import NativeOptions, model_options
from gallama.generation import ReportProgress

# Beside the weights of the model there are a vocabulary to read, and caches or buffers to be made.
_PART_OF_WEIGHTS = 0.95

T = TypeVar("T")


def load_model(
    path: Path,
    spec: ModelSpec,
    options: NativeOptions,
    report_progress: ReportProgress,
    make: Callable[[bindings.NativeModel, ExitStack], T],
) -> T:
    """Load a model, and make of it what computes with it. Blocks for as long as that takes.

    Args:
        make: puts what it opens onto the stack, and keeps that to close all of it at the end. If it fails,
            all is closed at once.

    Raises:
        InvalidConfig: the spec asks for what this build of llama.cpp cannot do.
        ModelLoadFailed: llama.cpp refused the file, or there is too little memory.
        GallamaError: as `make`.
    """
    bindings.initialize()
    opened = ExitStack()
    try:
        model = bindings.NativeModel(
            path,
            model_options(spec, options),
            report_progress=lambda fraction: report_progress(_PART_OF_WEIGHTS * fraction),
        )
        opened.callback(model.close)
        return make(model, opened)
    except BaseException:
        opened.close()
        raise
