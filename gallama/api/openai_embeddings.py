"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import logging
import sys
from array import array
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import Field, Tag
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gallama.api import server_sent_events
from gallama.api.client_presence import unless_client_left
from gallama.api.request_bodies import StrictBody, TokenIds, read_body
from gallama.api.request_id import request_id_of
from gallama.api.texts_or_tokens import BY_FORM, one_by_one
from gallama.api.tickets import model_to_ask, ticket_of
from gallama.config import ServerConfig
from gallama.embedding import Embeddings, EmbedRequest
from gallama.pool.pool import WorkerPool

logger = logging.getLogger(__name__)

router = APIRouter()

MAX_INPUTS = 2048
_WHOLE_ANSWER_BYTES = 2**16
"""Vectors of up to so many bytes are written at once; more of them piece by piece, as the client reads."""

EncodingFormat = Literal["float", "base64"]
Text = Annotated[str, Field(min_length=1)]
TextAsTokens = Annotated[TokenIds, Field(min_length=1)]


class EmbeddingsBody(StrictBody):
    input: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS), Tag("texts")]
        | Annotated[TextAsTokens, Tag("token ids")]
        | Annotated[
            list[TextAsTokens],
            Field(min_length=1, max_length=MAX_INPUTS),
            Tag("lists of token ids"),
        ],
        BY_FORM,
    ]
    model: Annotated[str, Field(min_length=1, max_length=512)]
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    encoding_format: EncodingFormat = "float"
    # Changes no answer
    user: str | None = None


@router.post("/v1/embeddings")
async def create_embeddings(http_request: Request) -> Response:
    config: ServerConfig = http_request.app.state.config
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    body = await read_body(http_request, EmbeddingsBody, max_bytes=config.max_body_bytes)
    request = EmbedRequest(
        request_id=request_id_of(http_request),
        model=model_to_ask(http_request, body.model, "embedding"),
        inputs=one_by_one(body.input),
        dimensions=body.dimensions,
    )
    embeddings = await unless_client_left(http_request.receive, pool.ask(request, ticket))
    assert isinstance(embeddings, Embeddings), "what embeds answers with vectors"
    return _to_answer(embeddings, request.model, body.encoding_format)


def _to_answer(embeddings: Embeddings, model: str, encoding_format: EncodingFormat) -> Response:
    """All at once where that is little; else the vectors are kept as they are, and written out while they
    are read: as text they take five times the room."""
    pieces = to_json(embeddings, model, encoding_format)
    if sum(map(len, embeddings.vectors)) <= _WHOLE_ANSWER_BYTES:
        return Response(b"".join(pieces), media_type="application/json")
    return PiecewiseResponse(pieces, media_type="application/json")


class PiecewiseResponse(StreamingResponse):
    """An answer that is made while it is read. A client that takes nothing of it for long, though it has not
    hung up, is left: what its answer is made of takes room."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = server_sent_events.UNREAD_SECONDS

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(seconds):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            logger.info("An answer ends: its client has read nothing for %.0f s.", seconds)


def to_json(embeddings: Embeddings, model: str, encoding_format: EncodingFormat) -> Iterator[bytes]:
    """The pieces of the answer's JSON."""
    encode = _to_base64 if encoding_format == "base64" else to_numbers
    between = b'{"object":"list","data":['
    for index, vector in enumerate(embeddings.vectors):
        yield b'%b{"object":"embedding","index":%d,"embedding":%b}' % (between, index, encode(vector))
        between = b","
    tokens = embeddings.prompt_tokens
    yield b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
        msgspec.json.encode(model),
        tokens,
        tokens,
    )


def _to_base64(vector: bytes) -> bytes:
    return b'"%b"' % base64.b64encode(vector)


def to_numbers(vector: bytes) -> bytes:
    """The JSON list of a vector's components."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return msgspec.json.encode(numbers.tolist())
