"""What a folder in Hugging Face's form says of its model's measures, read without trust.

A value that is missing, or no number that can be, counts as the library's default or as nothing: whether the
model is as it should be is for the engine to see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gallama.catalog.model_files import quantization_of, read_from_config
from gallama.catalog.safetensors_files import find_weights, read_tensors
from gallama.errors import InvalidConfig

_MOST = 2**30
_DEFAULT_CONTEXT_LENGTH = 8192
_EMBEDDING = "embed_tokens.weight"
_KEYS = (
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "layer_types",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSizes:
    """The measures of a model, with its weights as an engine holds them that computes in 2 bytes a number."""

    weight_bytes: int
    embedding_bytes: int
    """Of these, the table from tokens to vectors."""
    is_quantized: bool
    context_length: int
    """Tokens that it was trained for."""
    cache_numbers: int
    """Numbers that its cache has for each token, in all layers."""
    widest_cache_numbers: int
    """The same in the one layer that has most."""
    hidden_length: int
    intermediate_length: int
    vocabulary_size: int


def read_folder_sizes(folder: Path) -> FolderSizes:
    """
    Raises:
        InvalidConfig: the folder cannot be read.
    """
    # A model that knows more than text describes the part that writes by itself.
    config = {**read_from_config(folder, _KEYS), **read_from_config(folder, _KEYS, inside="text_config")}
    is_quantized = quantization_of(folder) is not None
    weight_bytes, embedding_bytes = _weights(folder, is_quantized=is_quantized)
    by_layer = _cache_numbers(config)
    return FolderSizes(
        weight_bytes=weight_bytes,
        embedding_bytes=embedding_bytes,
        is_quantized=is_quantized,
        context_length=_whole(config, "max_position_embeddings", _DEFAULT_CONTEXT_LENGTH),
        cache_numbers=sum(by_layer),
        widest_cache_numbers=max(by_layer, default=0),
        hidden_length=_whole(config, "hidden_size"),
        intermediate_length=_whole(config, "intermediate_size"),
        vocabulary_size=_whole(config, "vocab_size"),
    )


def stored_bytes(folder: Path) -> int:
    """What the files of a folder's weights take.

    Raises:
        InvalidConfig: they cannot be read.
    """
    try:
        return sum(file.stat().st_size for file in find_weights(folder))
    except OSError as error:
        raise InvalidConfig(f"The folder {folder} cannot be read: {error.strerror}.") from None


def _weights(folder: Path, *, is_quantized: bool) -> tuple[int, int]:
    """Bytes of all tensors, and those of the embedding."""
    total = embedding = 0
    for name, tensor in read_tensors(folder):
        # What is not quantized is kept in 2 bytes a number, whatever it is stored in.
        size = tensor.stored_bytes // (2 if tensor.dtype == "F32" and not is_quantized else 1)
        total += size
        embedding += size if name.endswith(_EMBEDDING) else 0
    return total, embedding


def _cache_numbers(config: Mapping[str, Any]) -> list[int]:
    """Of each layer that has keys and values."""
    heads, hidden = _whole(config, "num_attention_heads", 1), _whole(config, "hidden_size")
    layers = min(_whole(config, "num_hidden_layers"), 4096)
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        layers = sum("attention" in str(kind) and kind != "linear_attention" for kind in kinds[:layers])
    if latent := _whole(config, "kv_lora_rank"):  # keys and values are made of one vector
        return [latent + _whole(config, "qk_rope_head_dim")] * layers
    head_length = _whole(config, "head_dim", hidden // max(heads, 1))
    return [2 * _whole(config, "num_key_value_heads", heads) * head_length] * layers


def _whole(config: Mapping[str, Any], key: str, default: int = 0) -> int:
    value = config.get(key)
    return value if type(value) is int and 0 < value <= _MOST else default
