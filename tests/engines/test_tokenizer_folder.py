"""What a folder says of its tokens, read as transformers reads it, and what it must not say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig

from gallama.config import ModelSpec
from gallama.engines.tokenizer_folder import FolderTokens, read_folder_tokens
from gallama.engines.transformers.loading import load_tokens
from gallama.engines.transformers.options import TransformersOptions
from gallama.errors import InvalidConfig, ModelLoadFailed
from tests.engines.test_tokenizer_file import sentencepiece
from tests.engines.tiny_llama import save_tiny_llama
from tests.engines.tiny_tokenizer import CHAT_TEMPLATE

MARK, END, START, LAST = 409, 2, 1, 410
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("tokens"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


def spec_for(folder: Path, **settings: Any) -> ModelSpec:
    return ModelSpec(model_id=str(folder), backend="transformers", **settings)


def tokens_of(folder: Path, **settings: Any) -> FolderTokens:
    return read_folder_tokens(folder, spec_for(folder, **settings))


def tokens_by_transformers(folder: Path) -> FolderTokens:
    config = AutoConfig.from_pretrained(folder)
    return load_tokens(folder, config, spec_for(folder), TransformersOptions.model_validate({}))


def write(name: str, **content: Any) -> Change:
    """Write a JSON file with these keys over its own; a key that is ... is taken out."""

    def change(folder: Path) -> None:
        file = folder / name
        old = json.loads(file.read_text()) if file.exists() else {}
        new = {key: value for key, value in {**old, **content}.items() if value is not ...}
        file.write_text(json.dumps(new))

    return change


def write_text(name: str, text: str) -> Change:
    return lambda folder: void((folder / name).write_text(text))


def void(_: object) -> None:
    pass


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def without_added_tokens(folder: Path) -> None:
    """Leave tokens to other files that tokenizer.json had at its end."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < MARK]
    file.write_text(json.dumps(described))


def with_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(sentencepiece().to_str())


def with_half_prefix(folder: Path) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    described["model"]["continuing_subword_prefix"] = "longer than a token"
    (folder / "tokenizer.json").write_text(json.dumps(described))


def with_padding(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=8, pad_token="<|endoftext|>")
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))


def added(content: str, *, special: bool = False) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, "special": special, **flags}


ADDED = {str(MARK): added("<tool_call>"), str(LAST): added("</tool_call>", special=True)}
OBJECT = {"__type": "AddedToken", **added("<|im_start|>")}
TEMPLATE = "{{ messages[0]['content'] }}"
NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
CHANGES: dict[str, list[Change]] = {
    "as it is": [],
    "the end token as an object": [write("tokenizer_config.json", eos_token=OBJECT)],
    "no end token": [write("tokenizer_config.json", eos_token=...)],
    "a mark that is a control token": [write("tokenizer_config.json", added_tokens_decoder=ADDED)],
    "tokens that only tokenizer_config.json has": [
        without_added_tokens,
        write("tokenizer_config.json", added_tokens_decoder=ADDED),
    ],
    "tokens that only added_tokens.json has": [
        without_added_tokens,
        write("added_tokens.json", **{"</tool_call>": LAST, "<tool_call>": MARK}),
        write("tokenizer_config.json", additional_special_tokens=["</tool_call>"]),
    ],
    "special tokens in a file of their own": [
        write("special_tokens_map.json", eos_token=OBJECT, pad_token="<tool_call>")
    ],
    "special tokens in a file that is too old": [
        write("tokenizer_config.json", added_tokens_decoder=ADDED),
        write("special_tokens_map.json", eos_token="<|im_start|>"),
    ],
    "more special tokens by name": [
        write("tokenizer_config.json", extra_special_tokens={"image_token": "<tool_call>"})
    ],
    "special tokens of the model's own vocabulary": [
        write("tokenizer_config.json", additional_special_tokens=["tags"], sep_token="led")
    ],
    "sentencepiece": [with_sentencepiece, write("tokenizer_config.json", eos_token="</s>")],
    "a tokenizer that pads": [with_padding],
    "a template in the config": [
        remove("chat_template.jinja"),
        write("tokenizer_config.json", chat_template=TEMPLATE),
    ],
    "templates by name": [
        remove("chat_template.jinja"),
        write("tokenizer_config.json", chat_template=NAMED),
    ],
    "templates without a default": [
        remove("chat_template.jinja"),
        write("tokenizer_config.json", chat_template=NAMED[:1]),
    ],
    "two templates": [write("tokenizer_config.json", chat_template=TEMPLATE)],
    "no template": [remove("chat_template.jinja")],
    "no generation config": [remove("generation_config.json")],
    "one more end": [write("generation_config.json", eos_token_id=1)],
    "more ends": [write("config.json", eos_token_id=[2, 1, 409])],
    "ends that are no tokens": [write("config.json", eos_token_id=[7000, 2, -1])],
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_tokens_are_read_as_by_transformers(changes: list[Change], folder: Path) -> None:
    for change in changes:
        change(folder)
    ours, theirs = tokens_of(folder), tokens_by_transformers(folder)
    assert ours.chat_template == theirs.chat_template
    assert ours.vocabulary.tokens == theirs.vocabulary.tokens
    assert ours.vocabulary.control_tokens == theirs.vocabulary.control_tokens
    assert ours.vocabulary.marks == theirs.vocabulary.marks
    assert ours.vocabulary.end_token_ids == theirs.vocabulary.end_token_ids
    assert ours.vocabulary.end_token_id == theirs.vocabulary.end_token_id
    assert ours.vocabulary.start_token_id == theirs.vocabulary.start_token_id
    assert ours.vocabulary.fingerprint == theirs.vocabulary.fingerprint
    text = "<|im_start|>the old tags led<tool_call>bridge</tool_call>" * 3
    assert ours.file.tokenize(text) == theirs.file.tokenize(text)
    assert ours.vocabulary.encode(text.encode()) == theirs.vocabulary.encode(text.encode())


def test_a_folder_of_a_tokenizer_alone_ends_where_its_config_says(folder: Path) -> None:
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    tokens = tokens_of(folder)
    assert tokens.vocabulary.end_token_ids == {END}
    assert tokens.chat_template == ""


def test_a_model_of_more_than_text_ends_where_the_part_for_text_says(folder: Path) -> None:
    remove("generation_config.json")(folder)
    described = {"eos_token_id": [START], "vocab_size": 500}
    write("config.json", eos_token_id=..., vocab_size=..., text_config=described)(folder)
    assert tokens_of(folder).vocabulary.end_token_ids == {START, END}


def test_the_template_of_a_processor_is_taken_where_there_is_no_other(folder: Path) -> None:
    write("chat_template.json", chat_template=TEMPLATE)(folder)
    assert tokens_of(folder).chat_template == CHAT_TEMPLATE
    remove("chat_template.jinja")(folder)
    assert tokens_of(folder).chat_template == TEMPLATE


def test_a_special_token_that_the_model_does_not_know_gets_no_id(folder: Path) -> None:
    write("tokenizer_config.json", pad_token="<|made up|>")(folder)
    assert "<|made up|>" not in tokens_of(folder).vocabulary.control_tokens


def test_an_end_token_of_the_spec_ends_an_answer_and_is_not_the_preferred_one(folder: Path) -> None:
    vocabulary = tokens_of(folder, eos_token_list=["<|im_start|>"]).vocabulary
    assert vocabulary.end_token_ids == {0, END, START}
    assert vocabulary.end_token_id == END


def test_an_end_token_of_the_spec_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"eos_token_list.*two words"):
        tokens_of(folder, eos_token_list=["two words"])


REFUSED: dict[str, tuple[list[Change], str]] = {
    "no config": ([remove("config.json")], "has no config.json"),
    "no tokenizer": ([remove("tokenizer.json")], r"no tokenizer\.json.*save_pretrained"),
    "half a tokenizer": ([write_text("tokenizer.json", '{"model": ')], "the tokenizer cannot be read"),
    "no tokenizer inside": ([write_text("tokenizer.json", "{}")], "cannot be read: Model missing"),
    "a tokenizer that the library breaks on": ([with_half_prefix], "cannot be read"),
    "half a character": ([write("tokenizer_config.json", pad_token="\ud800")], "cannot be read.*surrogates"),
    "half a config": ([write_text("config.json", "{")], r"config\.json cannot be read.*again"),
    "a config of another form": ([write_text("config.json", "[]")], r"config\.json cannot be read"),
    "a config without end": ([write_text("config.json", "[" * 100_000)], r"config\.json cannot be read"),
    "an end of another form": (
        [write("generation_config.json", eos_token_id="</s>")],
        r"generation_config\.json cannot be read.*eos_token_id",
    ),
    "a file that is no text": (
        [lambda folder: void((folder / "chat_template.jinja").write_bytes(b"\xff"))],
        r"chat_template\.jinja cannot be read",
    ),
    "an end token that is none": (
        [write("tokenizer_config.json", eos_token="<|made up|>")],
        r"made up.*no token of tokenizer\.json",
    ),
    "an id that another file denies": (
        [write("tokenizer_config.json", added_tokens_decoder={"7": added("<tool_call>")})],
        r"'<tool_call>' has the id 7.*409",
    ),
    "an id that leaves a gap": (
        [write("added_tokens.json", **{"<|new|>": 450})],
        r"new.*has the id 450.*411",
    ),
    "more tokens than the model": ([write("config.json", vocab_size=410)], "only 410 tokens"),
    "no end at all": (
        [
            remove("generation_config.json"),
            write("config.json", eos_token_id=...),
            write("tokenizer_config.json", eos_token=...),
        ],
        "no token that ends an answer",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_cannot_be_read_is_refused(changes: list[Change], message: str, folder: Path) -> None:
    for change in changes:
        change(folder)
    with pytest.raises(ModelLoadFailed, match=message) as refusal:
        tokens_of(folder)
    assert refusal.value.message.startswith(f"{folder}: ")


def test_a_file_that_is_far_too_large_is_not_read(folder: Path) -> None:
    with (folder / "tokenizer_config.json").open("wb") as file:
        file.truncate(2**32)  # takes no place on the disk
    with pytest.raises(ModelLoadFailed, match=r"tokenizer_config\.json has 4294967296 bytes"):
        tokens_of(folder)


def test_a_token_far_behind_all_others_takes_no_memory(folder: Path) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    described["model"]["vocab"]["far away"] = 2**32 - 1
    (folder / "tokenizer.json").write_text(json.dumps(described))
    write("config.json", vocab_size=2**32)(folder)
    with pytest.raises(ModelLoadFailed, match="'far away' with the id 4294967295"):
        tokens_of(folder)
