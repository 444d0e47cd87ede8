"""Chat events as OpenAI writes them: one chat.completion, or a stream of chat.completion.chunk."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

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
    ReasoningText,
    Reply,
    Span,
    ToolArguments,
    ToolCall,
    ToolCallStarted,
    Usage,
)
from gallama.errors import ReportedError

# What OpenAI sends for a token that can hardly be; JSON has no infinity.
_LEAST_LOGPROB = -9999.0

BETWEEN_THINKING_AND_ANSWER = "\n\n"
ReturnThinking = bool | Literal["separate", "fields"]
"""Where the model's thinking goes: False: nowhere, True: in front of the content, "separate": beside it,
"fields": beside it, and that of a template's leaves also each for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHead:
    """What every part of one reply repeats."""

    id: str
    model: str
    fingerprint: str
    wants_logprobs: bool
    return_thinking: ReturnThinking = "separate"
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
    return head.payload("chat.completion", choices) | {"usage": to_usage(reply.usage)}


def guarantee_header(reply: Reply) -> dict[str, str]:
    """The guarantee of a whole answer as a header: an object; for several choices a list of them.

    Without `validated_keywords`: names of a schema may be long, and no ASCII.
    """
    guarantees = [_to_short_guarantee(choice.guarantee) for choice in reply.choices if choice.guarantee]
    if not guarantees:
        return {}
    value = guarantees[0] if len(guarantees) == 1 else guarantees
    return {"x-gallama-guarantee": msgspec.json.encode(value).decode("ascii")}


def _to_short_guarantee(guarantee: Guarantee) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(guarantee)
    del fields["validated_keywords"]
    return fields


async def to_chunks(
    events: AsyncGenerator[ChatEvent, None], head: ReplyHead, *, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in pieces; closes `events`.

    Raises:
        ReportedError: the events end in a Failure.
    """
    writer = _ChunkWriter(head)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Failure):
                raise ReportedError(event.error)
            for choice in writer.choices(event):
                chunk = head.payload("chat.completion.chunk", [choice])
                yield chunk | {"usage": None} if include_usage else chunk
            if isinstance(event, Completed) and include_usage:
                yield head.payload("chat.completion.chunk", []) | {"usage": to_usage(event.usage)}


class _ChunkWriter:
    """What each event adds to its choice, as chunks have it."""

    def __init__(self, head: ReplyHead) -> None:
        self._head = head
        self._begun: set[int] = set()
        self._thought: set[int] = set()
        """Choices whose content so far is thinking."""

    def choices(self, event: ChatEvent) -> Iterator[dict[str, Any]]:
        """The first delta of each choice says whose turn it is."""
        if not isinstance(event, ReasoningText | AnswerText | ToolCallStarted | ToolArguments | Finished):
            return
        if event.choice not in self._begun:
            self._begun.add(event.choice)
            content = None if isinstance(event, ToolCallStarted) else ""
            yield _chunk_choice(event.choice, {"role": "assistant", "content": content, "refusal": None})
        match event:
            case ReasoningText():
                yield from self._reasoning(event)
            case AnswerText():
                yield from self._seam(event.choice)
                logprobs = _to_logprobs(event.logprobs) if self._head.wants_logprobs else None
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
                yield last | to_guarantee(event.guarantee) | to_explanation(event.spans)

    def _reasoning(self, event: ReasoningText) -> Iterator[dict[str, Any]]:
        wanted = self._head.return_thinking
        if wanted is True:
            self._thought.add(event.choice)
            yield _chunk_choice(event.choice, {"content": event.text})
        elif wanted:
            delta: dict[str, Any] = {"reasoning_content": event.text, "thinking": event.text}
            if wanted == "fields" and event.field_index is not None:
                part = {"index": event.field_index, "path": event.field_path, "text": event.text}
                delta["thinking_fields"] = [part]
            yield _chunk_choice(event.choice, delta)

    def _seam(self, choice: int) -> Iterator[dict[str, Any]]:
        if choice in self._thought:
            self._thought.remove(choice)
            yield _chunk_choice(choice, {"content": BETWEEN_THINKING_AND_ANSWER})


def _chunk_choice(index: int, delta: dict[str, Any], *, logprobs: object = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _to_choice(choice: ChoiceReply, index: int, head: ReplyHead) -> dict[str, Any]:
    return {
        "index": index,
        "message": _to_message(choice, head.return_thinking),
        "logprobs": _to_logprobs(choice.logprobs) if head.wants_logprobs else None,
        "finish_reason": choice.finish_reason,
    } | (to_guarantee(choice.guarantee) | to_explanation(choice.spans))


def _to_message(choice: ChoiceReply, return_thinking: ReturnThinking) -> dict[str, Any]:
    content = choice.text
    if return_thinking is True:
        content = BETWEEN_THINKING_AND_ANSWER.join(filter(None, (choice.reasoning, choice.text)))
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if choice.tool_calls:
        message["content"] = content or None
        message["tool_calls"] = [_to_tool_call(call) for call in choice.tool_calls]
    if choice.reasoning and isinstance(return_thinking, str):
        message |= {"reasoning_content": choice.reasoning, "thinking": choice.reasoning}
    if return_thinking == "fields":
        message["thinking_fields"] = [
            {"path": part.path, "text": part.text} for part in choice.thinking_fields
        ]
    return message


def _to_tool_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def to_guarantee(guarantee: Guarantee | None) -> dict[str, Any]:
    return {} if guarantee is None else {"guarantee": msgspec.to_builtins(guarantee)}


def to_explanation(spans: Sequence[Span] | None) -> dict[str, Any]:
    return {} if spans is None else {"explanation": {"spans": msgspec.to_builtins(spans)}}


def _to_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, Any]:
    return {
        "content": [
            _to_logprob(entry.token, entry.token_bytes, entry.logprob)
            | {"top_logprobs": [_to_logprob(*other) for other in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def _to_logprob(token: str, token_bytes: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": to_json_logprob(logprob), "bytes": list(token_bytes)}


def to_json_logprob(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)


def to_usage(usage: Usage) -> dict[str, Any]:
    details = {"reasoning_tokens": usage.reasoning_tokens}
    if usage.accepted_draft_tokens is not None and usage.rejected_draft_tokens is not None:
        details["accepted_prediction_tokens"] = usage.accepted_draft_tokens
        details["rejected_prediction_tokens"] = usage.rejected_draft_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": details,
    }
