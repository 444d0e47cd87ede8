"""POST /v1/explain: what a chat request would do, without doing it."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from gallama.api.client_presence import unless_client_left
from gallama.api.openai_chat import collect, read_chat_request
from gallama.api.tickets import ticket_of
from gallama.conversation import Explanation
from gallama.pool.pool import WorkerPool

router = APIRouter()


@router.post("/v1/explain")
async def explain_chat_completion(http_request: Request) -> Response:
    """Takes the body of a chat request as it is; whether it streams makes no difference here."""
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    _, request = await read_chat_request(http_request)
    dry_run = msgspec.structs.replace(request, dry_run=True)
    reply = await unless_client_left(http_request.receive, collect(pool, dry_run, ticket))
    assert reply.explanation is not None, "a dry run explains"
    return JSONResponse(_to_body(reply.explanation, request.model))


def _to_body(explanation: Explanation, model: str) -> dict[str, Any]:
    return {"object": "chat.explanation", "model": model, **msgspec.to_builtins(explanation)}
