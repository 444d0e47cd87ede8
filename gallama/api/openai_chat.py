"""POST /v1/chat/completions, whole and streamed."""

from __future__ import annotations

import secrets
from contextlib import aclosing

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from gallama.api.asking import accepted, comment_on
from gallama.api.client_presence import unless_client_left
from gallama.api.openai_chat_reply import ReplyHead, guarantee_header, to_chunks, to_completion
from gallama.api.openai_chat_request import ChatCompletionBody, to_chat_request
from gallama.api.request_bodies import read_body
from gallama.api.request_id import request_id_of
from gallama.api.server_sent_events import EventStream
from gallama.api.tickets import check_may_ask, ticket_of
from gallama.config import ServerConfig
from gallama.conversation import ChatRequest, Reply, collect_reply
from gallama.pool.pool import WorkerPool
from gallama.pool.ticket import Ticket

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(http_request: Request) -> Response:
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    body, request = await read_chat_request(http_request)
    head = ReplyHead(
        id=f"chatcmpl-{secrets.token_hex(16)}",
        model=request.model,
        fingerprint=pool.identify(request.model).fingerprint,
        wants_logprobs=request.logprobs is not None,
        return_thinking=body.return_thinking,
    )
    if body.stream:
        asking = await unless_client_left(http_request.receive, accepted(pool.chat(request, ticket)))
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = to_chunks(asking.events(), head, include_usage=include_usage)
        return EventStream(chunks, source=asking, comment=lambda: comment_on([ticket]))
    reply = await unless_client_left(http_request.receive, collect(pool, request, ticket))
    return JSONResponse(to_completion(reply, head), headers=guarantee_header(reply))


async def read_chat_request(http_request: Request) -> tuple[ChatCompletionBody, ChatRequest]:
    """The body of a chat request, and what it means with the model that answers.

    Raises:
        GallamaError: it is refused.
    """
    config: ServerConfig = http_request.app.state.config
    pool: WorkerPool = http_request.app.state.pool
    body = await read_body(http_request, ChatCompletionBody, max_bytes=config.max_body_bytes)
    model = pool.identify(body.model).name
    check_may_ask(http_request, model)
    return body, to_chat_request(body, request_id=request_id_of(http_request), model=model)


async def collect(pool: WorkerPool, request: ChatRequest, ticket: Ticket) -> Reply:
    """The whole answer to a request."""
    async with aclosing(pool.chat(request, ticket)) as events:
        return await collect_reply(events)
