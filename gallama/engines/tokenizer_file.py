"""The vocabulary of a tokenizer of Hugging Face's `tokenizers`: its tokens as the bytes that they write.

How a token is spelled in tokenizer.json follows from the decoder:

    ByteLevel       "Ġhello"             one letter stands for each byte, as in GPT-2
    ByteFallback    "▁hello", "<0x0A>"   SentencePiece: ▁ is a blank, and bytes without a token have names
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from gallama.errors import InvalidConfig, ModelLoadFailed
from gallama.generation import Vocabulary

_BLANK = "▁"
_NAMED_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Texts that are cut into tokens and joined again, to see that the spelling was understood.
_SAMPLES = ("Hello, world!", " blanks  and\n\nlines\t", '{"a": [1, 2.5, null]}', "Grüße", "世界", "😀")
# What stands in a prompt only, though not every tokenizer says so: llama.cpp's converter goes by the same.
_LOOKS_LIKE_CONTROL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>")


class TokenizerFile:
    """The tokenizer of a tokenizer.json."""

    def __init__(self, tokenizer: Tokenizer, *, extra_control: Sequence[str] = ()) -> None:
        """
        Args:
            tokenizer: of this object from here on; one that neither pads nor truncates.
            extra_control: names of tokens that are control tokens whatever the file says.
        """
        self._prompts = tokenizer
        self._steps = _steps_of(tokenizer)
        self.ids: Mapping[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self._added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
        self.control_tokens = {
            token.content: token_id
            for token_id, token in self._added.items()
            if token.special or _LOOKS_LIKE_CONTROL.fullmatch(token.content) or token.content in extra_control
        }
        self.marks = frozenset(token.content for token in self._added.values()) - set(self.control_tokens)
        self._texts = self._tokenizer_of_texts()

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a prompt: control tokens in it are recognised, nothing is added."""
        return list(self._prompts.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text from the middle of an answer, which write it as it is."""
        return list(self._texts.encode(text, add_special_tokens=False).ids)

    def first_token(self) -> int | None:
        """The token that the file puts in front of every prompt, if any."""
        bare = self.tokenize("a")
        whole = list(self._prompts.encode("a").ids)
        return whole[0] if whole != bare and whole[:1] != bare[:1] else None

    def token_bytes(self) -> tuple[bytes, ...]:
        """What each token writes, b"" for control tokens and for ids that no token has.

        Raises:
            ModelLoadFailed: tokens are spelled in a way that is not known here.
        """
        spell = _speller(self._steps)
        texts = [b""] * (max(self.ids.values()) + 1)
        for name, token_id in self.ids.items():
            texts[token_id] = name.encode() if token_id in self._added else spell(name)
        for token_id in self.control_tokens.values():
            texts[token_id] = b""
        return tuple(texts)

    def _tokenizer_of_texts(self) -> Tokenizer:
        """One that takes control tokens for text, and changes nothing of a text before it cuts it."""
        changed = {
            **self._steps,
            "post_processor": None,
            "normalizer": _only_replacing(self._steps["normalizer"]),
            "pre_tokenizer": _without_blank_in_front(self._steps["pre_tokenizer"]),
        }
        tokenizer = Tokenizer.from_str(json.dumps(changed))
        tokenizer.model = self._prompts.model  # the same one: it is large, and is not changed
        tokenizer.add_tokens([self._as_written(token) for token in self._added.values()])
        tokenizer.encode_special_tokens = True
        ids = {token.content: token_id for token_id, token in self._added.items()}
        assert all(tokenizer.token_to_id(name) == ids[name] for name in ids), (
            "added in the order of their ids"
        )
        return tokenizer

    def _as_written(self, token: AddedToken) -> AddedToken:
        return AddedToken(
            token.content,
            single_word=token.single_word,
            normalized=token.normalized,
            special=token.content in self.control_tokens,
        )


def read_vocabulary(file: TokenizerFile, *, end_tokens: Sequence[int]) -> Vocabulary:
    """
    Args:
        end_tokens: what ends an answer, the one that the model prefers first. One that is no control token
            writes nothing any more: inside an answer its text is written with other tokens.

    Raises:
        ModelLoadFailed: there are none, no other tokens write their texts, or tokens cannot be read as bytes.
    """
    if not end_tokens:
        raise ModelLoadFailed("The model has no token that ends an answer; name one in `eos_token_list`.")
    written_texts = file.token_bytes()
    ends = {token: written_texts[token] for token in end_tokens if written_texts[token]}
    texts = tuple(b"" if token in ends else text for token, text in enumerate(written_texts))
    encode = _encoder(file, texts, ends)
    for sample in _SAMPLES:
        written = b"".join(texts[token] for token in encode(sample.encode()))
        if written != sample.encode():
            raise ModelLoadFailed(
                f"The tokenizer cannot be read: the tokens of {sample!r} write {written!r}. Constraints could"
                " not be held with it."
            )
    return Vocabulary(
        tokens=texts,
        control_tokens=file.control_tokens,
        marks=file.marks,
        end_token_ids=frozenset(end_tokens),
        end_token_id=end_tokens[0],
        start_token_id=file.first_token(),
        encode=encode,
        fingerprint=_fingerprint(texts, file.control_tokens),
    )


def token_named(tokenizer: Tokenizer, text: str) -> int:
    """The token of `eos_token_list`.

    Raises:
        InvalidConfig: the text is no one token.
    """
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if len(token_ids) != 1:
        raise InvalidConfig(f"`eos_token_list` has {text!r}, which is not one token of this model.")
    return token_ids[0]


def _encoder(
    file: TokenizerFile, texts: Sequence[bytes], ends: Mapping[int, bytes]
) -> Callable[[bytes], list[int]]:
    """Tokenization of bytes: what is no whole character is written byte by byte.

    Args:
        ends: tokens that are not to be used, with their texts; these are written byte by byte, too.

    Raises:
        ModelLoadFailed: a byte of them has no other token.
    """
    single_bytes = {text[0]: token for token, text in enumerate(texts) if len(text) == 1}
    for text in ends.values():
        if not set(text) <= set(single_bytes):
            raise ModelLoadFailed(
                f"The token {text.decode(errors='replace')!r} ends an answer, and no other tokens write its"
                " text: constraints could not be held. Leave it out of `eos_token_list`; requests have"
                " `stop`."
            )
    instead = {token: [single_bytes[byte] for byte in text] for token, text in ends.items()}

    def encode(text: bytes) -> list[int]:
        return [token for part in _whole_characters(text) for token in encode_part(part)]

    def encode_part(part: str | bytes) -> list[int]:
        if isinstance(part, str):
            return [token for whole in file.encode(part) for token in instead.get(whole, (whole,))]
        return [single_bytes[byte] for byte in part if byte in single_bytes]

    return encode


def _whole_characters(text: bytes) -> Iterator[str | bytes]:
    """The text in parts: whole characters as text, and what is none as bytes."""
    while text:
        try:
            yield text.decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield text[: error.start].decode()
            yield text[error.start : error.end]
            text = text[error.end :]


def _fingerprint(texts: Sequence[bytes], control_tokens: Mapping[str, int]) -> str:
    names = {token: name.encode() for name, token in control_tokens.items()}
    named = (names.get(token, text) for token, text in enumerate(texts))
    return hashlib.sha256(b"\0".join(named)).hexdigest()


def _speller(description: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How the names of plain tokens become bytes.

    Raises:
        ModelLoadFailed: by none of the ways that are known here.
    """
    decoders = {part["type"] for part in _parts(description["decoder"], "decoders")}
    if "ByteLevel" in decoders:
        return _spell_byte_level
    if decoders & {"ByteFallback", "Metaspace"}:
        return _spell_sentencepiece
    raise ModelLoadFailed(
        f"The tokenizer's decoder is {' and '.join(sorted(decoders)) or 'not given'}; what is known here is"
        " ByteLevel, and SentencePiece's ByteFallback and Metaspace."
    )


def _spell_byte_level(name: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF_LETTER.__getitem__, name))
    except KeyError:
        return name.encode()


def _spell_sentencepiece(name: str) -> bytes:
    if byte := _NAMED_BYTE.fullmatch(name):
        return bytes([int(byte[1], 16)])
    return name.replace(_BLANK, " ").encode()


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own letters, the others take letters from 256 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return own | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()


def _steps_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer does before and after its model, as its JSON describes it; with an empty model."""
    steps = Tokenizer(models.BPE())
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (step := getattr(tokenizer, name)) is not None:
            setattr(steps, name, step)
    described: dict[str, Any] = json.loads(steps.to_str())
    return described


def _parts(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or decoder, which may be a sequence of some."""
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _only_replacing(normalizer: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What only spells a text in another way: no blank in front, no letters made one or lower."""
    kept = [part for part in _parts(normalizer, "normalizers") if part["type"] == "Replace"]
    return {"type": "Sequence", "normalizers": kept} if kept else None


def _without_blank_in_front(pre_tokenizer: Mapping[str, Any] | None) -> dict[str, Any] | None:
    parts = _parts(pre_tokenizer, "pretokenizers")
    changed = []
    for part in parts:
        if part["type"] == "ByteLevel":
            part = {**part, "add_prefix_space": False}
        if part["type"] == "Metaspace":
            part = {**part, "prepend_scheme": "never"}
        changed.append(part)
    return {"type": "Sequence", "pretokenizers": changed} if changed else None
