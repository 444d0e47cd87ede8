"""A small tokenizer as its folder has it: byte-level BPE, trained on a few sentences.

It needs `tokenizers` alone, which is read in a moment.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<tool_call>", "</tool_call>")
END_TOKEN = "<|im_end|>"
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


def train_tiny_tokenizer() -> Tokenizer:
    """The same one each time."""
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
    return tokenizer


def save_tiny_tokenizer(folder: Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json, as the library of that name would."""
    tokenizer = train_tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer
