"""A Llama of two small layers with random weights, and a real tokenizer: what it says is noise.

Noise is the hardest test of a guarantee: nothing in it leans towards what was asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.engines.tiny_tokenizer import CHAT_TEMPLATE, END_TOKEN, train_tiny_tokenizer

PADDED_BY = 46
CONTEXT_LENGTH = 1024
GPU_CONTEXT_LENGTH = 4096
VOCABULARY_MULTIPLE = 128
"""To which ExLlamaV3 pads the rows of logits."""


def save_tiny_llama(folder: Path, **config: Any) -> Path:
    """Write the model's folder, the same one each time.

    Args:
        config: of `LlamaConfig`, over what it has here.
    """
    return save_tiny_model(folder, LlamaForCausalLM, LlamaConfig, **config)


def save_llama_for_gpu(
    folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, *, never_ends: bool = False, **config: Any
) -> Path:
    """Write a Llama in half precision, as libraries for GPUs read it: ExLlamaV2 and ExLlamaV3.

    Args:
        tokenizer: None: the tiny one.
        never_ends: no end token is ever the likeliest, nor likelier than most, so that all answers are as
            long as they may be.
        config: of `LlamaConfig`, over what is the smallest that both compute with all of their kernels.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {
        "vocab_size": -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": GPU_CONTEXT_LENGTH,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config})).half()
    if never_ends:
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    _say_it_as_older_readers_want(folder / "config.json")
    return folder


def _say_it_as_older_readers_want(file: Path) -> None:
    """transformers 5 has `rope_theta` inside `rope_parameters`, where ExLlamaV2 does not look."""
    config = {name: value for name, value in json.loads(file.read_text()).items() if value is not None}
    config["rope_theta"] = config.get("rope_parameters", {}).get("rope_theta", 10_000.0)
    file.write_text(json.dumps(config, indent=2))


def save_tiny_model(folder: Path, model_class: Any, config_class: Any, **config: Any) -> Path:
    """As `save_tiny_llama`, of another family.

    The logits are padded beyond the tokens, and so wide apart that the last bits decide nothing.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {
        "vocab_size": len(tokenizer) + PADDED_BY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**{**shape, **config}))
    model.generation_config.eos_token_id = [0, 2]
    model.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=train_tiny_tokenizer(), eos_token=END_TOKEN)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
