"""A Llama of two small layers with random weights, and a real tokenizer: what it says is noise.

Noise is the hardest test of a guarantee: nothing in it leans towards what was asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<tool_call>", "</tool_call>")
PADDED_BY = 46
CONTEXT_LENGTH = 1024
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n# Tools\nFor each function call, return a json object with function"
    ' name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>,'
    ' "arguments": <args-json-object>}\n</tool_call>\n'
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = """
The old bridge across the river was built of stone. Every morning the farmers led their carts over it to the
market in the town, and every evening they came back with empty carts and full purses. {"name": "Alice",
"age": 30, "tags": ["a", "b"], "married": true, "city": "Zürich", "children": null}
def add(a, b): return a + b
"""


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
    """Byte-level BPE, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
