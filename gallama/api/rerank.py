"""POST /v1/rerank: how well documents answer a query, in the form that Jina, Cohere and vLLM share."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gallama.api.client_presence import unless_client_left
from gallama.api.request_bodies import StrictBody, read_body
from gallama.api.request_id import request_id_of
from gallama.api.tickets import model_to_ask, ticket_of
from gallama.config import ServerConfig
from gallama.embedding import Relevances, RerankRequest
from gallama.errors import RequestTooLarge
from gallama.pool.pool import WorkerPool

router = APIRouter()

MAX_DOCUMENTS = 2048

Text = Annotated[str, Field(min_length=1)]


class DocumentBody(StrictBody):
    text: Text


class RerankBody(StrictBody):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    query: Text
    documents: Annotated[list[Text | DocumentBody], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    # Changes no answer
    user: str | None = None


@router.post("/v1/rerank")
@router.post("/rerank")
async def rerank(http_request: Request) -> Response:
    config: ServerConfig = http_request.app.state.config
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    body = await read_body(http_request, RerankBody, max_bytes=config.max_body_bytes)
    documents = tuple(part if isinstance(part, str) else part.text for part in body.documents)
    _check_size(body.query, documents, config.max_body_bytes)
    request = RerankRequest(
        request_id=request_id_of(http_request),
        model=model_to_ask(http_request, body.model, "embedding"),
        query=body.query,
        documents=documents,
    )
    relevances = await unless_client_left(http_request.receive, pool.ask(request, ticket))
    assert isinstance(relevances, Relevances), "what ranks answers with scores"
    return JSONResponse(_to_answer(relevances, request, body))


def _check_size(query: str, documents: tuple[str, ...], max_characters: int) -> None:
    """
    Raises:
        RequestTooLarge: the model would have far more to read than was sent.
    """
    characters = len(query) * len(documents) + sum(map(len, documents))
    if characters > max_characters:
        raise RequestTooLarge(
            f"The query is read once with each of the {len(documents)} documents, which makes {characters}"
            f" characters; at most {max_characters} are read. Send a shorter query, or fewer documents.",
            param="query",
        )


def _to_answer(relevances: Relevances, request: RerankRequest, body: RerankBody) -> dict[str, Any]:
    """The best document first; of equals the one that was sent first."""
    ranking = sorted(enumerate(relevances.scores), key=lambda scored: -scored[1])
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": score} for index, score in ranking[: body.top_n]
    ]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": request.documents[result["index"]]}
    tokens = relevances.prompt_tokens
    return {
        "id": f"rerank-{secrets.token_hex(16)}",
        "object": "list",
        "model": request.model,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
