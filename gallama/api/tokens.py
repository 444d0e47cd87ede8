"""POST /v1/tokenize and /v1/detokenize, in vLLM's form: what a model's tokens are, with nothing computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gallama.api.client_presence import unless_client_left
from gallama.api.openai_chat_request import ChatCompletionBody, to_chat_request
from gallama.api.openai_generation_body import refuse_unhonoured
from gallama.api.request_bodies import StrictBody, TokenIds, read_body, read_body_of
from gallama.api.request_id import request_id_of
from gallama.api.tickets import model_to_ask, ticket_of
from gallama.config import ServerConfig
from gallama.errors import InvalidRequest
from gallama.pool.pool import WorkerPool
from gallama.tokenization import DetokenizedText, DetokenizeRequest, TokenizedText, TokenizeRequest

router = APIRouter()

MAX_CHARACTERS = 2**20
"""Of a text: ten times as many take a tokenizer half a minute, in which nothing can stop it."""

HONOURED_VALUES: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
}
"""Of the fields that say how a prompt is made of messages, what a chat request does in any case."""


class TextBody(StrictBody):
    """A text as it stands."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    add_special_tokens: bool = True
    return_token_strs: bool = False


class ConversationBody(ChatCompletionBody):
    """A chat request, whole: what its prompt is may depend on any field."""

    return_token_strs: bool = False
    # vLLM's, of which only the usual value is honoured
    add_generation_prompt: Any = None
    add_special_tokens: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: Any = None
    mm_processor_kwargs: Any = None


class DetokenizeBody(StrictBody):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    tokens: TokenIds


@router.post("/v1/tokenize")
@router.post("/tokenize")
async def tokenize(http_request: Request) -> Response:
    config: ServerConfig = http_request.app.state.config
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    body = await read_body_of(http_request, _body_type, max_bytes=config.max_body_bytes)
    request = _to_request(body, http_request)
    tokenized = await unless_client_left(http_request.receive, pool.ask(request, ticket))
    assert isinstance(tokenized, TokenizedText)
    return _answer(
        {
            "count": len(tokenized.token_ids),
            "max_model_len": tokenized.context_length,
            "tokens": tokenized.token_ids,
            "token_strs": tokenized.token_texts if body.return_token_strs else None,
        }
    )


@router.post("/v1/detokenize")
@router.post("/detokenize")
async def detokenize(http_request: Request) -> Response:
    config: ServerConfig = http_request.app.state.config
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    body = await read_body(http_request, DetokenizeBody, max_bytes=config.max_body_bytes)
    request = DetokenizeRequest(
        request_id=request_id_of(http_request),
        model=model_to_ask(http_request, body.model, None),
        token_ids=tuple(body.tokens),
    )
    detokenized = await unless_client_left(http_request.receive, pool.ask(request, ticket))
    assert isinstance(detokenized, DetokenizedText)
    return _answer({"prompt": detokenized.text})


def _body_type(values: Mapping[str, Any]) -> type[TextBody | ConversationBody]:
    """
    Raises:
        InvalidRequest: there is not exactly one of what can be tokenized.
    """
    is_text, is_conversation = (values.get(name) is not None for name in ("prompt", "messages"))
    if is_text == is_conversation:
        raise InvalidRequest("Send either `prompt` or `messages`.", param="prompt")
    return TextBody if is_text else ConversationBody


def _to_request(body: TextBody | ConversationBody, http_request: Request) -> TokenizeRequest:
    """
    Raises:
        GallamaError: it is refused.
    """
    request_id = request_id_of(http_request)
    if isinstance(body, TextBody):
        return TokenizeRequest(
            request_id=request_id,
            model=model_to_ask(http_request, body.model, None),
            text=body.prompt,
            add_special_tokens=body.add_special_tokens,
        )
    for name, honoured in HONOURED_VALUES.items():
        refuse_unhonoured(name, getattr(body, name), honoured)
    model = model_to_ask(http_request, body.model, "llm")
    chat = to_chat_request(body, request_id=request_id, model=model)
    return TokenizeRequest(request_id=request_id, model=model, chat=chat)


def _answer(content: dict[str, Any]) -> Response:
    # Not the standard library's JSON: there may be a million tokens.
    return Response(msgspec.json.encode(content), media_type="application/json")
