"""POST /v1/completions, whole and streamed: texts that a model goes on with, without a template."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from gallama.api.asking import accepted, comment_on
from gallama.api.client_presence import unless_client_left
from gallama.api.openai_chat_reply import ReplyHead, guarantee_header
from gallama.api.openai_completion_reply import to_chunks, to_completion
from gallama.api.openai_completion_request import CompletionBody, to_chat_requests
from gallama.api.request_bodies import read_body
from gallama.api.request_id import request_id_of
from gallama.api.server_sent_events import EventStream
from gallama.api.tickets import model_to_ask, ticket_of
from gallama.config import ServerConfig
from gallama.conversation import (
    AnswerText,
    ChatEvent,
    ChatRequest,
    Completed,
    Failure,
    Finished,
    Reply,
    Usage,
    collect_reply,
)
from gallama.errors import ErrorReport, ReportedError
from gallama.interleave import interleaved
from gallama.pool.pool import WorkerPool
from gallama.pool.ticket import Ticket

router = APIRouter()

PROMPTS_AT_ONCE = 8
"""So many prompts of a request take slots, or wait for them; its others come after them."""


@router.post("/v1/completions")
async def create_completion(http_request: Request) -> Response:
    config: ServerConfig = http_request.app.state.config
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    body = await read_body(http_request, CompletionBody, max_bytes=config.max_body_bytes)
    model = model_to_ask(http_request, body.model, "llm")
    requests = to_chat_requests(body, request_id=request_id_of(http_request), model=model)
    tickets = [replace(ticket) for _ in requests]
    events = answers(pool, requests, tickets)
    head = ReplyHead(
        id=f"cmpl-{secrets.token_hex(16)}",
        model=model,
        fingerprint=pool.identify(model).fingerprint,
        wants_logprobs=body.logprobs is not None,
    )
    if body.stream:
        asking = await unless_client_left(http_request.receive, accepted(events))
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = to_chunks(asking.events(), head, include_usage=include_usage)
        return EventStream(chunks, source=asking, comment=lambda: comment_on(tickets))
    reply = await unless_client_left(http_request.receive, _collect(events))
    return JSONResponse(to_completion(reply, head), headers=guarantee_header(reply))


async def answers(
    pool: WorkerPool, requests: Sequence[ChatRequest], tickets: Sequence[Ticket]
) -> AsyncGenerator[ChatEvent, None]:
    """The answers to several prompts as those of one request: its choices are the first prompt's, then the
    second's, and so on. The first error ends all.

    Raises:
        GallamaError: one of them was refused, or has failed.
    """
    streams = [
        _answer(pool, request, ticket, prompt_index=index if len(requests) > 1 else None)
        for index, (request, ticket) in enumerate(zip(requests, tickets, strict=True))
    ]
    usages: list[Usage] = []
    async with aclosing(interleaved(streams, at_once=PROMPTS_AT_ONCE)) as events:
        async for event in events:
            if isinstance(event, Completed):
                usages.append(event.usage)
            else:
                yield event
    yield Completed(usage=_sum(usages))


async def _answer(
    pool: WorkerPool, request: ChatRequest, ticket: Ticket, *, prompt_index: int | None
) -> AsyncGenerator[ChatEvent, None]:
    """
    Args:
        prompt_index: the prompt's place among those of its request; None: it is the only one.

    Raises:
        GallamaError: it was refused, or has failed.
    """
    first_choice = (prompt_index or 0) * request.choices
    async with aclosing(pool.chat(request, ticket)) as events:
        async for event in events:
            match event:
                case Failure():
                    raise ReportedError(_of_prompt(event.error, prompt_index))
                case AnswerText() | Finished() if first_choice:
                    yield msgspec.structs.replace(event, choice=first_choice + event.choice)
                case _:
                    yield event


def _of_prompt(error: ErrorReport, index: int | None) -> ErrorReport:
    """An error with the place of the prompt that it is about."""
    if index is None or error.param != "prompt":
        return error
    return msgspec.structs.replace(error, param=f"prompt[{index}]")


def _sum(usages: Sequence[Usage]) -> Usage:
    guesses = any(usage.accepted_draft_tokens is not None for usage in usages)
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        accepted_draft_tokens=sum(usage.accepted_draft_tokens or 0 for usage in usages) if guesses else None,
        rejected_draft_tokens=sum(usage.rejected_draft_tokens or 0 for usage in usages) if guesses else None,
    )


async def _collect(events: AsyncGenerator[ChatEvent, None]) -> Reply:
    async with aclosing(events):
        return await collect_reply(events)
