"""Chat events as OpenAI writes them: one chat.completion, or a stream of chat.completion.chunk."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gallama.conversation import (
    AnswerText,
    ChatEvent,
    ChoiceReply,
    Completed,
    Failure,
    Finished,
    Guarantee,
    LogprobEntry,
    Reply,
    ToolArguments,
    ToolCall,
    ToolCallStarted,
    Usage,
)
from gallama.errors import ReportedError

# What OpenAI sends for a token that can hardly be; JSON has no infinity.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHead:
    """What every part of one reply repeats."""

    id: str
    model: str
    fingerprint: str
    wants_logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def payload(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def to_completion(reply: Reply, head: ReplyHead) -> dict[str, Any]:
    """The whole answer."""
    choices = [_to_choice(choice, i, head) for i, choice in enumerate(reply.choices)]
    return head.payload("chat.completion", choices) | {"usage": _to_usage(reply.usage)}


def guarantee_header(reply: Reply) -> dict[str, str]:
    """The guarantee of a whole answer as a header: an object; for several choices a list of them."""
    guarantees = [choice.guarantee for choice in reply.choices if choice.guarantee is not None]
    if not guarantees:
        return {}
    value: Guarantee | list[Guarantee] = guarantees[0] if len(guarantees) == 1 else guarantees
    return {"x-gallama-guarantee": msgspec.json.encode(value).decode("ascii")}


async def to_chunks(
    events: AsyncGenerator[ChatEvent, None], head: ReplyHead, *, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in pieces; closes `events`.

    Raises:
        ReportedError: the events end in a Failure.
    """
    begun: set[int] = set()
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Failure):
                raise ReportedError(event.error)
            for choice in _to_chunk_choices(event, begun, head):
                chunk = head.payload("chat.completion.chunk", [choice])
                yield chunk | {"usage": None} if include_usage else chunk
            if isinstance(event, Completed) and include_usage:
                yield head.payload("chat.completion.chunk", []) | {"usage": _to_usage(event.usage)}


def _to_chunk_choices(event: ChatEvent, begun: set[int], head: ReplyHead) -> Iterator[dict[str, Any]]:
    """What an event adds to its choice; the first delta of each choice says whose turn it is."""
    if not isinstance(event, AnswerText | ToolCallStarted | ToolArguments | Finished):
        return
    if event.choice not in begun:
        begun.add(event.choice)
        content = None if isinstance(event, ToolCallStarted) else ""
        yield _chunk_choice(event.choice, {"role": "assistant", "content": content, "refusal": None})
    match event:
        case AnswerText():
            logprobs = _to_logprobs(event.logprobs) if head.wants_logprobs else None
            yield _chunk_choice(event.choice, {"content": event.text}, logprobs=logprobs)
        case ToolCallStarted():
            call = ToolCall(id=event.call_id, name=event.name, arguments="")
            yield _chunk_choice(
                event.choice, {"tool_calls": [{"index": event.call_index} | _to_tool_call(call)]}
            )
        case ToolArguments():
            piece = {"index": event.call_index, "function": {"arguments": event.text}}
            yield _chunk_choice(event.choice, {"tool_calls": [piece]})
        case Finished():
            last = _chunk_choice(event.choice, {}) | {"finish_reason": event.reason}
            yield last | _to_guarantee(event.guarantee)


def _chunk_choice(index: int, delta: dict[str, Any], *, logprobs: object = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _to_choice(choice: ChoiceReply, index: int, head: ReplyHead) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [_to_tool_call(call) for call in choice.tool_calls]
    return {
        "index": index,
        "message": message,
        "logprobs": _to_logprobs(choice.logprobs) if head.wants_logprobs else None,
        "finish_reason": choice.finish_reason,
    } | _to_guarantee(choice.guarantee)


def _to_tool_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _to_guarantee(guarantee: Guarantee | None) -> dict[str, Any]:
    return {} if guarantee is None else {"guarantee": msgspec.to_builtins(guarantee)}


def _to_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, Any]:
    return {
        "content": [
            _to_logprob(entry.token, entry.token_bytes, entry.logprob)
            | {"top_logprobs": [_to_logprob(*other) for other in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def _to_logprob(token: str, token_bytes: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(token_bytes)}


def _to_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
