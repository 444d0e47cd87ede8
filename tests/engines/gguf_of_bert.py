"""A BERT model in a folder as a GGUF file, with weights and vocabulary as llama.cpp wants them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

ARCHITECTURE = "bert"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


class RandomHead:
    """A classifier with weights drawn at random, as a cross-encoder has one."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.tensors: dict[str, NDArray[np.float32]] = {
            "cls.weight": (rng.normal(size=(384, 384)) / 20).astype(np.float32),
            "cls.bias": (rng.normal(size=384) / 10).astype(np.float32),
            "cls.output.weight": (rng.normal(size=(1, 384)) / 5).astype(np.float32),
            "cls.output.bias": np.array([0.1], dtype=np.float32),
        }

    def score(self, first_token: NDArray[np.float32]) -> float:
        weights, bias, out_weights, out_bias = self.tensors.values()
        logit = out_weights @ np.tanh(weights @ first_token + bias) + out_bias
        return float(1 / (1 + np.exp(-logit[0])))


def write_gguf_of_bert(
    folder: Path,
    file: Path,
    *,
    pooling: gguf.PoolingType | None = gguf.PoolingType.MEAN,
    more_tensors: dict[str, NDArray[np.float32]] | None = None,
    rerank_template: str | None = None,
) -> Path:
    """
    Args:
        folder: of the model, in the form of Hugging Face, with weights in safetensors.
        pooling: what the file says of it; None: nothing.
        more_tensors: by llama.cpp's names, as those of a classifier.
    """
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    _add_shape(writer, json.loads((folder / "config.json").read_text()))
    if pooling is not None:
        writer.add_pooling_type(pooling)
    if rerank_template is not None:
        writer.add_chat_template([{"name": "rerank", "template": rerank_template}])
    _add_vocabulary(writer, (folder / "vocab.txt").read_text().splitlines())
    for name, weights in _tensors(folder).items():
        writer.add_tensor(name, weights)
    for name, weights in (more_tensors or {}).items():
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_gguf_of_bytes(file: Path) -> Path:
    """A small BERT without sense, whose tokens are bytes alone: of a blank, written as U+2581, three."""
    width, positions = 32, 64
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    shape = {
        "max_position_embeddings": positions,
        "hidden_size": width,
        "num_hidden_layers": 1,
        "intermediate_size": width,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-6,
        "type_vocab_size": 2,
    }
    rows = {"token_embd": len(tokens), "position_embd": positions, "token_types": 2}
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    _add_shape(writer, shape)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    rng = np.random.default_rng(0)
    for name in _NAMES.values():
        place = name if name.startswith("token_") or name in rows else f"blk.0.{name}"
        is_matrix = not name.endswith("_norm")
        weights = rng.standard_normal((rows.get(name, width), width) if is_matrix else (width,))
        writer.add_tensor(f"{place}.weight", weights.astype(np.float32))
        if name not in rows:
            writer.add_tensor(f"{place}.bias", np.zeros(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("test")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_causal_attention(False)


def _add_vocabulary(writer: gguf.GGUFWriter, words: list[str]) -> None:
    """WordPiece: what begins a word has a mark, while in vocab.txt what goes on with one has "##"."""
    types = [gguf.TokenType.CONTROL if word in _SPECIAL else gguf.TokenType.NORMAL for word in words]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([_marked(word) for word in words])
    writer.add_token_types(types)
    writer.add_bos_token_id(words.index("[CLS]"))
    writer.add_eos_token_id(words.index("[SEP]"))
    writer.add_unk_token_id(words.index("[UNK]"))
    writer.add_sep_token_id(words.index("[SEP]"))
    writer.add_pad_token_id(words.index("[PAD]"))
    writer.add_mask_token_id(words.index("[MASK]"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(False)


def _marked(word: str) -> str:
    if word in _SPECIAL:
        return word
    return word.removeprefix("##") if word.startswith("##") else f"\u2581{word}"


def _tensors(folder: Path) -> dict[str, NDArray[np.float32]]:
    """The weights by llama.cpp's names; it has no use for the pooler, which was for training."""
    return {
        _native_name(name): weights.astype(np.float32)
        for name, weights in load_file(folder / "model.safetensors").items()
        if not name.startswith("pooler.") and not name.endswith("position_ids")
    }


def _native_name(name: str) -> str:
    match = re.fullmatch(r"(?:encoder\.layer\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert match is not None, name
    layer, part, kind = match.groups()
    return f"{'' if layer is None else f'blk.{layer}.'}{_NAMES[part]}.{kind}"
