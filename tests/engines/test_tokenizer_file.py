"""Tokenizers as they are spelled by several families, read as bytes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gallama.engines.tokenizer_file import TokenizerFile, read_vocabulary
from gallama.errors import ModelLoadFailed
from tests.engines.tiny_llama import tiny_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>")
END = 2


def sentencepiece(*, with_normalizer: bool = True) -> Tokenizer:
    """As Llama 2 and Mistral have it: blanks are ▁, and bytes without a token are named."""
    words = ["▁", "h", "e", "l", "o", "▁h", "ll", "el", "lo"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: token for token, name in enumerate(names)},
            merges=[("▁", "h"), ("l", "l"), ("e", "l"), ("l", "o")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    if with_normalizer:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    return tokenizer


def byte_level() -> Tokenizer:
    return Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())


def newer_sentencepiece() -> Tokenizer:
    return sentencepiece(with_normalizer=False)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece, newer": newer_sentencepiece,
}


@pytest.fixture(params=list(TOKENIZERS))
def file(request: pytest.FixtureRequest) -> TokenizerFile:
    return TokenizerFile(TOKENIZERS[request.param]())


def test_the_tokens_of_any_text_write_it(file: TokenizerFile) -> None:
    vocabulary = read_vocabulary(file, end_tokens=[END])
    rng = random.Random(0)
    letters = 'hello  \n\t<s>|{}"ßé世😀\u0301\x00▂'
    for _ in range(200):
        text = "".join(rng.choices(letters, k=rng.randint(0, 12))).encode()
        assert b"".join(vocabulary.tokens[token] for token in vocabulary.encode(text)) == text


def test_the_tokens_of_any_bytes_write_them(file: TokenizerFile) -> None:
    vocabulary = read_vocabulary(file, end_tokens=[END])
    rng = random.Random(0)
    for _ in range(200):
        text = bytes(rng.choices([*b"helo ", 0xC3, 0x9F, 0xFF, 0xF0, 0x80], k=rng.randint(0, 9)))
        assert b"".join(vocabulary.tokens[token] for token in vocabulary.encode(text)) == text


def test_control_tokens_are_found_in_prompts_only(file: TokenizerFile) -> None:
    vocabulary = read_vocabulary(file, end_tokens=[END])
    for name, token in vocabulary.control_tokens.items():
        assert token in file.tokenize(f"hello{name}hello")
        assert token not in vocabulary.encode(f"hello{name}hello".encode())
        assert vocabulary.tokens[token] == b""


def test_a_text_that_goes_on_gets_no_blank_in_front() -> None:
    for tokenizer in (sentencepiece(), newer_sentencepiece()):
        file = TokenizerFile(tokenizer)
        vocabulary = read_vocabulary(file, end_tokens=[END])
        assert vocabulary.tokens[vocabulary.encode(b"hello")[0]] == b"h"
        assert vocabulary.tokens[file.tokenize("hello")[0]] == b" h"


def test_the_token_that_every_prompt_begins_with_is_known() -> None:
    assert read_vocabulary(TokenizerFile(sentencepiece()), end_tokens=[END]).start_token_id == 1
    assert read_vocabulary(TokenizerFile(byte_level()), end_tokens=[END]).start_token_id is None


def test_a_token_that_is_not_special_is_a_mark_and_part_of_the_text() -> None:
    vocabulary = read_vocabulary(TokenizerFile(byte_level()), end_tokens=[END])
    assert vocabulary.marks == {"<tool_call>", "</tool_call>"}
    (token,) = vocabulary.encode(b"<tool_call>")
    assert vocabulary.tokens[token] == b"<tool_call>"


def test_letters_that_a_prompt_would_have_made_one_stay_as_they_are_in_an_answer() -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    vocabulary = read_vocabulary(TokenizerFile(tokenizer), end_tokens=[END])
    decomposed = "e\u0301".encode()
    assert b"".join(vocabulary.tokens[token] for token in vocabulary.encode(decomposed)) == decomposed


def test_equal_vocabularies_have_equal_fingerprints_and_others_do_not() -> None:
    one, same = (read_vocabulary(TokenizerFile(byte_level()), end_tokens=[END]) for _ in range(2))
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|another|>"])
    other = read_vocabulary(TokenizerFile(tokenizer), end_tokens=[END])
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_a_tokenizer_of_words_is_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "hello": 1, "##lo": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelLoadFailed, match="decoder is WordPiece"):
        read_vocabulary(TokenizerFile(tokenizer), end_tokens=[END])


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ModelLoadFailed, match="Constraints could not be held"):
        read_vocabulary(TokenizerFile(tokenizer), end_tokens=[END])


def test_a_vocabulary_without_an_end_is_refused() -> None:
    with pytest.raises(ModelLoadFailed, match="eos_token_list"):
        read_vocabulary(TokenizerFile(byte_level()), end_tokens=[])
