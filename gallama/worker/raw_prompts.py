"""Prompts without a template: their tokens, how what follows them is read, and their echo."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from gallama.conversation import AnswerText, ChatEvent, LogprobEntry, RawPrompt
from gallama.dialects.universal import UNIVERSAL
from gallama.errors import InvalidRequest, UnsupportedValue
from gallama.generation import Engine, TokenLogprob, Vocabulary
from gallama.worker.choice import Choice
from gallama.worker.text_logprobs import without_beginning
from gallama.worker.tokens import texts_of, tokenize

PLAIN = replace(UNIVERSAL, name="none", reasoning=None)
"""Reads an answer as text, whatever stands in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTokens:
    """A raw prompt as the model gets it."""

    token_ids: Sequence[int]
    text: str
    """Of a prompt in token ids: theirs, special tokens by name."""
    hidden: int = 0
    """How many tokens in front of those of the text are the model's own."""


def raw_tokens(engine: Engine, prompt: RawPrompt) -> RawTokens:
    """
    Raises:
        InvalidRequest: the model has no such token, or the prompt has none.
        UnsupportedValue: the model does not fill in.
    """
    vocabulary = engine.vocabulary
    if prompt.token_ids:
        _check_token_ids(prompt.token_ids, vocabulary)
        text = b"".join(texts_of(vocabulary, prompt.token_ids)).decode(errors="replace")
        plain = RawTokens(token_ids=prompt.token_ids, text=text)
    else:
        plain = _of_text(engine, prompt.text)
    if prompt.suffix is not None:
        return _with_suffix(engine, plain, prompt.suffix)
    if not plain.token_ids:
        raise InvalidRequest(
            "The prompt is empty, and this model has no token to begin with; send some text.", param="prompt"
        )
    return plain


def _check_token_ids(token_ids: Sequence[int], vocabulary: Vocabulary) -> None:
    size = len(vocabulary.tokens)
    foreign = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
    if foreign is not None:
        raise InvalidRequest(
            f"The prompt has token {foreign}; this model has the tokens 0 to {size - 1}.", param="prompt"
        )


def _of_text(engine: Engine, text: str) -> RawTokens:
    token_ids = tokenize(engine, text, add_special_tokens=True)
    start = engine.vocabulary.start_token_id
    if start is None:
        return RawTokens(token_ids=token_ids, text=text)
    (name,) = texts_of(engine.vocabulary, [start])
    return RawTokens(token_ids=token_ids, text=text, hidden=0 if text.encode().startswith(name) else 1)


def _with_suffix(engine: Engine, plain: RawTokens, suffix: str) -> RawTokens:
    infill = engine.vocabulary.infill
    if infill is None:
        raise UnsupportedValue(
            "This model was not made to fill in: it has no tokens that set off a suffix. Leave `suffix` out.",
            param="suffix",
        )
    token_ids = [
        *plain.token_ids[: plain.hidden],
        infill.prefix,
        *plain.token_ids[plain.hidden :],
        infill.suffix,
        *tokenize(engine, suffix, add_special_tokens=False),
        infill.middle,
    ]
    return RawTokens(token_ids=token_ids, text=plain.text, hidden=plain.hidden + 1)


async def with_echo(
    choice: Choice, index: int, prompt: RawTokens, vocabulary: Vocabulary
) -> AsyncGenerator[ChatEvent, None]:
    """The events of an answer that begins with its prompt.

    Raises:
        UnsupportedValue: the engine does not tell the prompt's log probabilities, and they are wanted.
    """
    is_first = True
    async with aclosing(choice.events()) as events:
        async for event in events:
            if is_first:
                yield AnswerText(index, prompt.text, _entries(prompt, choice, vocabulary))
                is_first = False
            yield event


def _entries(prompt: RawTokens, choice: Choice, vocabulary: Vocabulary) -> tuple[LogprobEntry, ...]:
    """Of the tokens that make up the prompt's text."""
    if not choice.wants_prompt_logprobs:
        return ()
    if len(choice.prompt_logprobs) != len(prompt.token_ids):
        raise UnsupportedValue(
            "The engine of this model does not tell the log probabilities of prompts; leave out `echo` or"
            " `logprobs`.",
            param="logprobs",
        )
    token_ids, of_text = prompt.token_ids[prompt.hidden :], choice.prompt_logprobs[prompt.hidden :]
    named = {*token_ids, *(token_id for each in of_text if each for token_id, _ in each.top)}
    texts = dict(zip(named, texts_of(vocabulary, list(named)), strict=True))
    entries = [_entry(*each, texts) for each in zip(token_ids, of_text, strict=True)]
    # Some tokenizers put a blank in front of every text.
    surplus = sum(len(entry.token_bytes) for entry in entries) - len(prompt.text.encode())
    entries[:1] = [without_beginning(entry, max(surplus, 0)) for entry in entries[:1]]
    return tuple(entries)


def _entry(token_id: int, logprob: TokenLogprob | None, texts: Mapping[int, bytes]) -> LogprobEntry:
    text = texts[token_id]
    if logprob is None:
        return LogprobEntry(text.decode(errors="replace"), text, None)
    top = tuple((texts[other].decode(errors="replace"), texts[other], value) for other, value in logprob.top)
    return LogprobEntry(text.decode(errors="replace"), text, logprob.logprob, top)
