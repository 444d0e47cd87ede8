"""What a model in a folder as Hugging Face has them reads and writes, without the transformers library.

tokenizer.json              the tokenizer itself
tokenizer_config.json       the end token, the chat template, and tokens that tokenizer.json may lack
special_tokens_map.json,    the same, as folders had it before 2024
added_tokens.json
chat_template.jinja         goes before the template of tokenizer_config.json; chat_template.json after it
generation_config.json      more end tokens
config.json                 the same, and how many tokens the model knows
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct
from tokenizers import AddedToken, Tokenizer

from gallama.config import ModelSpec
from gallama.engines.tokenizer_file import TokenizerFile, read_vocabulary, token_named
from gallama.errors import GallamaError, ModelLoadFailed
from gallama.generation import Vocabulary

# The largest that are known have 35 MB, 1 MB and 262,400 tokens.
_MOST_BYTES_OF_TOKENIZER = 2**28
_MOST_BYTES = 2**24
_MOST_TOKENS = 2**22

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FolderTokens:
    """What a model reads and writes."""

    file: TokenizerFile
    vocabulary: Vocabulary
    chat_template: str
    """Its own; "" when it has none."""


def read_folder_tokens(path: Path, spec: ModelSpec) -> FolderTokens:
    """The tokens of a model in a folder.

    Raises:
        InvalidConfig: `eos_token_list` names what is no token.
        ModelLoadFailed: there is no tokenizer.json, a file cannot be read, or they contradict each other.
    """
    with _naming(path):
        return _read_tokens(path, spec)


def make_tokens(
    tokenizer: Tokenizer,
    *,
    end_tokens: Iterable[int],
    spec: ModelSpec,
    chat_template: str,
    model_tokens: int | None,
) -> FolderTokens:
    """
    Args:
        tokenizer: what it is set to do with whole prompts is dropped.
        end_tokens: what ends an answer, the one that the model prefers first; those that are no tokens are
            left out.
        model_tokens: how many the model knows; None: its config.json does not say.

    Raises:
        InvalidConfig: `eos_token_list` names what is no token.
        ModelLoadFailed: the tokenizer has more tokens than the model, or cannot be read.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = False
    names = {token: name for name, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    _check_size(names, _MOST_TOKENS if model_tokens is None else min(model_tokens, _MOST_TOKENS))
    extra = [token_named(tokenizer, text) for text in spec.eos_token_list]
    ends = [token for token in dict.fromkeys([*end_tokens, *extra]) if token in names]
    file = TokenizerFile(tokenizer, extra_control=[names[token] for token in ends])
    return FolderTokens(file, read_vocabulary(file, end_tokens=ends), chat_template)


def read_generation_ends(path: Path) -> list[int]:
    """The end tokens of the folder's generation_config.json.

    Raises:
        ModelLoadFailed: it cannot be read.
    """
    with _naming(path):
        return _generation_ends(path)


def default_template(template: str | Mapping[str, str] | None) -> str:
    """The template for talking, of several by name."""
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or ""


def _read_tokens(path: Path, spec: ModelSpec) -> FolderTokens:
    described = _read(path / "tokenizer_config.json", _TokenizerConfig)
    has_older_form = described.added_tokens_decoder is None
    older = _read(path / "special_tokens_map.json", _SpecialTokens) if has_older_form else _SpecialTokens()
    config = _read_config(path)
    tokenizer = _read_tokenizer(path)
    named = [*older.tokens(), *described.tokens()]
    if has_older_form:
        added = _read(path / "added_tokens.json", dict[str, int])
        _add_missing(tokenizer, added, special={token.content for token in named})
    else:
        _add_tokens(tokenizer, described.added_tokens_decoder or {})
    _make_special(tokenizer, named)
    end = older.eos_token or described.eos_token
    return make_tokens(
        tokenizer,
        end_tokens=[*_ids_of(tokenizer, end), *_generation_ends(path), *config.end_tokens()],
        spec=spec,
        chat_template=_read_template(path, described),
        model_tokens=config.model_tokens(),
    )


def _generation_ends(path: Path) -> list[int]:
    return _listed(_read(path / "generation_config.json", _GenerationConfig).eos_token_id)


def _check_size(names: Mapping[int, str], model_tokens: int) -> None:
    if not names:
        raise ModelLoadFailed("The tokenizer has no tokens.")
    last = max(names)
    if last >= model_tokens:
        raise ModelLoadFailed(
            f"The tokenizer has the token {names[last]!r} with the id {last}, and the model knows only"
            f" {model_tokens} tokens: they do not belong together."
        )


class _AddedToken(Struct):
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True

    def to_library(self) -> AddedToken:
        return AddedToken(
            self.content,
            special=self.special,
            single_word=self.single_word,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            normalized=self.normalized,
        )


_Token = str | _AddedToken


class _NamedTemplate(Struct):
    name: str
    template: str


class _SpecialTokens(Struct):
    bos_token: _Token | None = None
    eos_token: _Token | None = None
    unk_token: _Token | None = None
    sep_token: _Token | None = None
    pad_token: _Token | None = None
    cls_token: _Token | None = None
    mask_token: _Token | None = None
    additional_special_tokens: list[_Token] | None = None
    extra_special_tokens: list[_Token] | dict[str, _Token] | None = None

    def tokens(self) -> list[_AddedToken]:
        extra = self.extra_special_tokens or []
        named = [
            self.bos_token,
            self.eos_token,
            self.unk_token,
            self.sep_token,
            self.pad_token,
            self.cls_token,
            self.mask_token,
            *(self.additional_special_tokens or ()),
            *(extra.values() if isinstance(extra, dict) else extra),
        ]
        return [_as_added(token) for token in named if token is not None]


class _TokenizerConfig(_SpecialTokens):
    added_tokens_decoder: dict[int, _AddedToken] | None = None
    chat_template: str | list[_NamedTemplate] | dict[str, str] | None = None


class _ProcessorTemplate(Struct):
    chat_template: str | None = None


class _GenerationConfig(Struct):
    eos_token_id: int | list[int] | None = None


class _TextConfig(_GenerationConfig):
    vocab_size: int | None = None


class _ModelConfig(_TextConfig):
    text_config: _TextConfig | None = None
    """Of a model that knows more than text."""

    def end_tokens(self) -> list[int]:
        inside = [] if self.text_config is None else _listed(self.text_config.eos_token_id)
        return [*inside, *_listed(self.eos_token_id)]

    def model_tokens(self) -> int | None:
        inside = None if self.text_config is None else self.text_config.vocab_size
        return inside or self.vocab_size


def _read_config(path: Path) -> _ModelConfig:
    if not (path / "config.json").is_file():
        raise ModelLoadFailed("This is no folder of a model: it has no config.json.")
    return _read(path / "config.json", _ModelConfig)


def _read_tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelLoadFailed(
            "There is no tokenizer.json. Take that of the model it was made from, or let transformers write"
            " it: `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`."
        )
    return Tokenizer.from_str(_read_text(file, most_bytes=_MOST_BYTES_OF_TOKENIZER))


def _read_template(path: Path, described: _TokenizerConfig) -> str:
    file = path / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = described.chat_template
    if isinstance(template, list):
        template = {each.name: each.template for each in template}
    if template is None:
        template = _read(path / "chat_template.json", _ProcessorTemplate).chat_template
    return default_template(template)


def _add_tokens(tokenizer: Tokenizer, tokens: Mapping[int, _AddedToken]) -> None:
    """Add what tokenizer.json lacks, and mark as special what it does not.

    Raises:
        ModelLoadFailed: a token has another id there.
    """
    known = tokenizer.get_added_tokens_decoder()
    wanted = {token: tokens[token].to_library() for token in sorted(tokens)}
    tokenizer.add_tokens([each for token, each in wanted.items() if known.get(token) != each])
    _check_ids(tokenizer, {token: each.content for token, each in tokens.items()})


def _add_missing(tokenizer: Tokenizer, ids: Mapping[str, int], *, special: Iterable[str]) -> None:
    """As `_add_tokens`, from names and ids alone."""
    special = set(special)
    for name in sorted(ids, key=ids.__getitem__):
        if tokenizer.token_to_id(name) is None:
            is_special = name in special
            tokenizer.add_tokens([AddedToken(name, special=is_special, normalized=not is_special)])
    _check_ids(tokenizer, {token: name for name, token in ids.items()})


def _check_ids(tokenizer: Tokenizer, names: Mapping[int, str]) -> None:
    for token, name in names.items():
        if tokenizer.token_to_id(name) != token:
            raise ModelLoadFailed(
                f"The token {name!r} has the id {token} in one file of the folder, and"
                f" {tokenizer.token_to_id(name)} by tokenizer.json: take all of the tokenizer's files from"
                " one place."
            )


def _make_special(tokenizer: Tokenizer, named: Sequence[_AddedToken]) -> None:
    """Make control tokens of those that a file gives a part to play.

    One that is not in the vocabulary would get an id that the model does not know: it is left out.
    """
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens(
        [
            added.get(token.content, token.to_library())
            for token in named
            if tokenizer.token_to_id(token.content) is not None
        ]
    )


def _ids_of(tokenizer: Tokenizer, end: _Token | None) -> list[int]:
    """
    Raises:
        ModelLoadFailed: the end token is none.
    """
    if end is None:
        return []
    name = _as_added(end).content
    token = tokenizer.token_to_id(name)
    if token is None:
        raise ModelLoadFailed(
            f"tokenizer_config.json says that {name!r} ends an answer, which is no token of tokenizer.json:"
            " take both from one place."
        )
    return [token]


def _as_added(token: _Token) -> _AddedToken:
    return _AddedToken(token, normalized=False) if isinstance(token, str) else token


def _listed(token_ids: int | list[int] | None) -> list[int]:
    return [token_ids] if isinstance(token_ids, int) else token_ids or []


def _read(file: Path, kind: type[T]) -> T:
    """What a JSON file has that is needed here; that of an empty one where there is no file.

    Raises:
        ModelLoadFailed: it is of another form.
    """
    text = _read_text(file) if file.is_file() else "{}"
    try:
        return msgspec.convert(json.loads(text), kind, str_keys=True)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise ModelLoadFailed(f"{file.name} cannot be read: {error}. Download it again.") from error


def _read_text(file: Path, *, most_bytes: int = _MOST_BYTES) -> str:
    try:
        size = file.stat().st_size
        if size > most_bytes:
            raise ModelLoadFailed(f"{file.name} has {size} bytes; no such file has more than {most_bytes}.")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadFailed(f"{file.name} cannot be read: {error}. Download it again.") from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors that name the folder, also of the library, which has no classes of its own for them."""
    try:
        yield
    except ModelLoadFailed as error:
        raise ModelLoadFailed(f"{path}: {error.message}") from error
    except (GallamaError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # when it panics, that is no Exception
        raise ModelLoadFailed(
            f"{path}: the tokenizer cannot be read: {error}. Download tokenizer.json and the files beside it"
            " again."
        ) from error
