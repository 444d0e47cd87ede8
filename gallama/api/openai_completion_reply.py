"""Answers to prompts as OpenAI writes them: one text_completion, or a stream of them."""

from __future__ import annotations

import codecs
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from gallama.api.openai_chat_reply import (
    ReplyHead,
    to_explanation,
    to_guarantee,
    to_json_logprob,
    to_usage,
)
from gallama.conversation import (
    AnswerText,
    ChatEvent,
    ChoiceReply,
    Completed,
    Failure,
    Finished,
    LogprobEntry,
    Reply,
)
from gallama.errors import ReportedError

_KIND = "text_completion"


def to_completion(reply: Reply, head: ReplyHead) -> dict[str, Any]:
    """The whole answer."""
    choices = [_to_choice(choice, i, head) for i, choice in enumerate(reply.choices)]
    return head.payload(_KIND, choices) | {"usage": to_usage(reply.usage)}


async def to_chunks(
    events: AsyncGenerator[ChatEvent, None], head: ReplyHead, *, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in pieces; closes `events`.

    Raises:
        ReportedError: the events end in a Failure.
    """
    places: defaultdict[int, _Places] = defaultdict(_Places)
    async with aclosing(events):
        async for event in events:
            match event:
                case AnswerText():
                    logprobs = (
                        _to_logprobs(event.logprobs, places[event.choice]) if head.wants_logprobs else None
                    )
                    choice = _choice(event.choice, event.text, logprobs)
                case Finished():
                    choice = _choice(event.choice, "", None) | {"finish_reason": event.reason}
                    choice |= to_guarantee(event.guarantee) | to_explanation(event.spans)
                case Completed() if include_usage:
                    yield head.payload(_KIND, []) | {"usage": to_usage(event.usage)}
                    continue
                case Failure():
                    raise ReportedError(event.error)
                case _:
                    continue
            chunk = head.payload(_KIND, [choice])
            yield chunk | {"usage": None} if include_usage else chunk


def _to_choice(choice: ChoiceReply, index: int, head: ReplyHead) -> dict[str, Any]:
    logprobs = _to_logprobs(choice.logprobs, _Places()) if head.wants_logprobs else None
    whole = _choice(index, choice.text, logprobs) | {"finish_reason": choice.finish_reason}
    return whole | to_guarantee(choice.guarantee) | to_explanation(choice.spans)


def _choice(index: int, text: str, logprobs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}


class _Places:
    """Where in a choice's text its tokens begin, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, token_bytes: bytes) -> int:
        """The place of the token that comes next."""
        place = self._length
        self._length += len(self._decoder.decode(token_bytes))
        return place


def _to_logprobs(entries: Sequence[LogprobEntry], places: _Places) -> dict[str, Any]:
    return {
        "tokens": [_shown(entry.token, entry.token_bytes) for entry in entries],
        "token_logprobs": [to_json_logprob(entry.logprob) for entry in entries],
        "top_logprobs": [_to_top(entry) for entry in entries],
        "text_offset": [places.next(entry.token_bytes) for entry in entries],
    }


def _to_top(entry: LogprobEntry) -> dict[str, float | None] | None:
    """The likeliest tokens, and the one that stands there."""
    if entry.logprob is None:
        return None
    top = {_shown(token, token_bytes): to_json_logprob(logprob) for token, token_bytes, logprob in entry.top}
    return top | {_shown(entry.token, entry.token_bytes): to_json_logprob(entry.logprob)}


def _shown(token: str, token_bytes: bytes) -> str:
    """A token's text; of one that cuts a character its bytes, as OpenAI names them: "bytes:\\xe2\\x80"."""
    if "\ufffd" not in token:
        return token
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)
