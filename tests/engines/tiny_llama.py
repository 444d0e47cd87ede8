"""A Llama of two small layers with random weights, and a real tokenizer: what it says is noise.

Noise is the hardest test of a guarantee: nothing in it leans towards what was asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.engines.tiny_tokenizer import CHAT_TEMPLATE, END_TOKEN, train_tiny_tokenizer

PADDED_BY = 46
CONTEXT_LENGTH = 1024


def save_tiny_llama(folder: Path, **config: Any) -> Path:
    """Write the model's folder, the same one each time.

    Args:
        config: of `LlamaConfig`, over what it has here.
    """
    return save_tiny_model(folder, LlamaForCausalLM, LlamaConfig, **config)


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
