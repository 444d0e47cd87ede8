"""The simple API, as LLM-API has it: POST /generate, /agenerate and /embeddings, GET /check.

    {"prompt": "What is the capital of France?", "params": {"max_tokens": 25}}   ->   "..."
    {"text": "What is the capital of France?"}                                   ->   [0.01, ...]

The parameters have the names of llama-cpp-python, of transformers' GenerationConfig and of our own API. One
that cannot be honoured is refused by name.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gallama.api.asking import accepted, comment_on
from gallama.api.client_presence import unless_client_left
from gallama.api.openai_chat import collect
from gallama.api.openai_chat_reply import guarantee_header
from gallama.api.openai_embeddings import to_numbers
from gallama.api.openai_generation_body import (
    GenerationBody,
    StopWord,
    to_constraints,
    to_sampling,
    to_stop_words,
)
from gallama.api.request_bodies import StrictBody, read_body
from gallama.api.request_id import request_id_of
from gallama.api.server_sent_events import EventStream, to_text_event
from gallama.api.tickets import model_to_ask, ticket_of
from gallama.api.tokens import MAX_CHARACTERS
from gallama.config import ServerConfig
from gallama.config.model_spec import ModelType
from gallama.conversation import AnswerText, ChatEvent, ChatRequest, Failure, RawPrompt
from gallama.embedding import Embeddings, EmbedRequest
from gallama.errors import (
    GallamaError,
    InvalidRequest,
    ModelNotFound,
    ReportedError,
    UnsupportedValue,
    WorkerUnavailable,
)
from gallama.generation import SamplingSettings
from gallama.pool.pool import WorkerPool
from gallama.pool.ticket import Ticket
from gallama.tokenization import TokenizedText, TokenizeRequest

router = APIRouter()

USUAL_MAX_TOKENS = 128
"""Of an answer to a request that names no limit, as with LLM-API."""

_NO_PLACE = "the answer is a text, which has no place for it; use /v1/completions"
_ONE_ANSWER = "one answer is made; use /v1/completions for several"
WITHOUT_EFFECT: Mapping[str, tuple[tuple[object, ...], str]] = {
    "best_of": ((1,), _ONE_ANSWER),
    "diversity_penalty": ((0, 0.0), ""),
    "early_stopping": ((False,), ""),
    "encoder_repetition_penalty": ((1, 1.0), ""),
    "epsilon_cutoff": ((0, 0.0), ""),
    "eta_cutoff": ((0, 0.0), ""),
    "explain": ((False,), _NO_PLACE),
    "guidance_scale": ((1, 1.0), ""),
    "length_penalty": ((1, 1.0), ""),
    "logprobs": ((), _NO_PLACE),
    "min_length": ((0,), "a `regex_pattern` can say how long an answer must be"),
    "min_new_tokens": ((0,), "a `regex_pattern` can say how long an answer must be"),
    "mirostat_eta": ((0.1,), ""),
    "mirostat_mode": ((0,), ""),
    "mirostat_tau": ((5, 5.0), ""),
    "n": ((1,), _ONE_ANSWER),
    "no_repeat_ngram_size": ((0,), ""),
    "num_beam_groups": ((1,), ""),
    "num_beams": ((1,), ""),
    "num_return_sequences": ((1,), _ONE_ANSWER),
    "output_attentions": ((False,), _NO_PLACE),
    "output_hidden_states": ((False,), _NO_PLACE),
    "output_logits": ((False,), _NO_PLACE),
    "output_scores": ((False,), _NO_PLACE),
    "penalty_alpha": ((0, 0.0), ""),
    "remove_invalid_values": ((False,), ""),
    "renormalize_logits": ((False,), ""),
    "return_dict_in_generate": ((False,), _NO_PLACE),
    "stream_options": ((), _NO_PLACE),
    "tfs_z": ((1, 1.0), ""),
    "typical_p": ((1, 1.0), ""),
    "use_cache": ((True,), ""),
}
"""Parameters that are read for the values that change nothing, and what to do for another value."""

T = TypeVar("T")
ModelName = Annotated[str, Field(max_length=512)]
Limit = Literal[-1] | Annotated[int, Field(ge=1)]
"""Of tokens; -1: as many as the context holds."""


class GenerateParams(GenerationBody):
    """`GenerationBody` has most of it; these are the other libraries' names."""

    model: ModelName = ""
    max_tokens: Limit | None = None
    max_new_tokens: Limit | None = None
    n_predict: Limit | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None
    do_sample: bool | None = None
    echo: bool = False
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop_strings: StopWord | list[StopWord] = Field(default=[])
    suffix: str | None = None
    temp: Annotated[float, Field(ge=0, le=2)] | None = None
    pad_token_id: int | None = None
    """Changes no answer: nothing is padded."""
    # Of which only the usual value is honoured
    best_of: Any = None
    diversity_penalty: Any = None
    early_stopping: Any = None
    encoder_repetition_penalty: Any = None
    epsilon_cutoff: Any = None
    eta_cutoff: Any = None
    guidance_scale: Any = None
    length_penalty: Any = None
    logprobs: Any = None
    min_length: Any = None
    min_new_tokens: Any = None
    mirostat_eta: Any = None
    mirostat_mode: Any = None
    mirostat_tau: Any = None
    no_repeat_ngram_size: Any = None
    num_beam_groups: Any = None
    num_beams: Any = None
    num_return_sequences: Any = None
    output_attentions: Any = None
    output_hidden_states: Any = None
    output_logits: Any = None
    output_scores: Any = None
    penalty_alpha: Any = None
    remove_invalid_values: Any = None
    renormalize_logits: Any = None
    return_dict_in_generate: Any = None
    tfs_z: Any = None
    typical_p: Any = None
    use_cache: Any = None


class GenerateBody(StrictBody):
    prompt: str
    params: GenerateParams = GenerateParams()
    model: ModelName = ""
    """Needed only where several models are served."""


class EmbedBody(StrictBody):
    text: Annotated[str, Field(min_length=1)]
    model: ModelName = ""


@router.post("/generate")
async def generate(http_request: Request) -> Response:
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    request = await _read_request(http_request, ticket, streams=False)
    with _named_as_sent(_in_params):
        reply = await unless_client_left(http_request.receive, collect(pool, request, ticket))
    return JSONResponse(reply.choices[0].text, headers=guarantee_header(reply))


@router.post("/agenerate")
async def stream_generated(http_request: Request) -> Response:
    """The same text in pieces: each event is one, as it is, and the stream ends behind the last."""
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    request = await _read_request(http_request, ticket, streams=True)
    with _named_as_sent(_in_params):
        asking = await unless_client_left(http_request.receive, accepted(pool.chat(request, ticket)))
    return EventStream(
        _texts(asking.events()),
        encode=to_text_event,
        last=b"",
        source=asking,
        comment=lambda: comment_on([ticket]),
    )


@router.post("/embeddings")
async def embed(http_request: Request) -> Response:
    config: ServerConfig = http_request.app.state.config
    pool: WorkerPool = http_request.app.state.pool
    ticket = ticket_of(http_request)
    body = await read_body(http_request, EmbedBody, max_bytes=config.max_body_bytes)
    request = EmbedRequest(
        request_id=request_id_of(http_request),
        model=_model_to_ask(http_request, body.model, "embedding"),
        inputs=(body.text,),
    )
    with _named_as_sent(lambda param: "text" if param == "input" else param):
        embeddings = await unless_client_left(http_request.receive, pool.ask(request, ticket))
    assert isinstance(embeddings, Embeddings), "what embeds answers with vectors"
    return Response(to_numbers(embeddings.vectors[0]), media_type="application/json")


@router.api_route("/check", methods=["GET", "HEAD"])
async def check(http_request: Request) -> str:
    """
    Raises:
        WorkerUnavailable: a model that is loaded at the start cannot answer; LLM-API answers from then on.
    """
    pool: WorkerPool = http_request.app.state.pool
    if all("ready" in model.states for model in pool.loads_at_start):
        return "Ok"
    raise WorkerUnavailable("A model is not loaded yet, or cannot be; GET /ready tells which.")


@contextmanager
def _named_as_sent(place_of: Callable[[str], str]) -> Iterator[None]:
    """Have errors name the place that a value has in the bodies of these paths, which is not that of /v1.

    Args:
        place_of: makes it of the other.
    """
    try:
        yield
    except GallamaError as error:
        report = error.report()
        if report.param is None:
            raise
        place = place_of(report.param)
        message = report.message.replace("`input[0]`", "`text`")
        raise ReportedError(msgspec.structs.replace(report, param=place, message=message)) from None


def _in_params(param: str) -> str:
    is_beside_them = param in GenerateBody.model_fields or param.startswith("params.")
    return param if is_beside_them else f"params.{param}"


async def _read_request(http_request: Request, ticket: Ticket, *, streams: bool) -> ChatRequest:
    """What a request means with the model that answers.

    Raises:
        GallamaError: it is refused.
    """
    config: ServerConfig = http_request.app.state.config
    pool: WorkerPool = http_request.app.state.pool
    body = await read_body(http_request, GenerateBody, max_bytes=config.max_body_bytes)
    name = _same(**{"model": body.model or None, "params.model": body.params.model or None})
    model = _model_to_ask(http_request, name or "", "llm")
    with _named_as_sent(_in_params):
        request = to_chat_request(body, request_id=request_id_of(http_request), model=model, streams=streams)
    max_length = body.params.max_length
    if max_length is None or _named_limit(body.params) is not None:
        return request
    within = _within_length(pool, request, max_length, ticket)
    return await unless_client_left(http_request.receive, within)


def to_chat_request(body: GenerateBody, *, request_id: str, model: str, streams: bool) -> ChatRequest:
    """What the body means, but for `max_length`, which takes a count of the prompt's tokens.

    Args:
        model: the name of the model that answers.

    Raises:
        InvalidRequest: the parameters contradict each other.
        UnsupportedValue: a value is not honoured.
    """
    params = body.params
    _check_values(params, streams=streams)
    return ChatRequest(
        request_id=request_id,
        model=model,
        prompt=RawPrompt(text=body.prompt, suffix=params.suffix, echo=params.echo),
        constraints=to_constraints(params),
        on_unsupported=params.on_unsupported,
        constraint_engine=params.guided_decoding_backend,
        repetition_guard=params.repetition_guard,
        sampling=_to_sampling(params),
        max_tokens=_to_max_tokens(params),
        stop=to_stop_words(_with_stop_strings(params)),
        return_stop_word=params.return_stop_word,
    )


def _check_values(params: GenerateParams, *, streams: bool) -> None:
    """
    Raises:
        UnsupportedValue: a value is not honoured.
    """
    for name in sorted(params.model_fields_set & WITHOUT_EFFECT.keys()):
        honoured, way_out = WITHOUT_EFFECT[name]
        value = getattr(params, name)
        # By type too: 0 is not False.
        if not any(type(value) is type(each) and value == each for each in honoured):
            raise _unsupported(name, way_out or "leave it out")
    if "stream" in params.model_fields_set and params.stream != streams:
        raise _unsupported("stream", "/generate answers with the whole text, /agenerate with a stream")
    if params.suffix is not None and params.max_length is not None and _named_limit(params) is None:
        raise _unsupported("max_length", "with `suffix`, use `max_new_tokens`")


def _unsupported(name: str, way_out: str) -> UnsupportedValue:
    return UnsupportedValue(f"`{name}` is not supported with this value: {way_out}.", param=f"params.{name}")


def _model_to_ask(http_request: Request, name: str, model_type: ModelType) -> str:
    """
    Raises:
        GallamaError: as `model_to_ask`; without a name, where there is not one model alone of the type.
    """
    try:
        return model_to_ask(http_request, name, model_type)
    except ModelNotFound:
        if name:
            raise
        what_it_does = "makes vectors" if model_type == "embedding" else "makes text"
        raise ModelNotFound(
            f"Of the models that answer to any name, not exactly one {what_it_does}; name one in `model`.",
            param="model",
        ) from None


async def _within_length(
    pool: WorkerPool, request: ChatRequest, max_length: int, ticket: Ticket
) -> ChatRequest:
    """The request with as many tokens as `max_length` leaves, which counts those of the prompt too.

    Raises:
        InvalidRequest: that is none.
        GallamaError: the prompt's tokens could not be counted.
    """
    assert request.prompt is not None
    if len(request.prompt.text) > MAX_CHARACTERS:
        raise InvalidRequest(
            f"`max_length` counts the prompt's tokens, and the prompt has more than {MAX_CHARACTERS}"
            " characters. Send `max_new_tokens` instead.",
            param="params.max_length",
        )
    counting = TokenizeRequest(request_id=request.request_id, model=request.model, text=request.prompt.text)
    counted = await pool.ask(counting, replace(ticket, on_end=None))
    assert isinstance(counted, TokenizedText), "what counts tokens answers with them"
    prompt_tokens = len(counted.token_ids)
    if prompt_tokens >= max_length:
        raise InvalidRequest(
            f"`max_length` is {max_length}, which counts prompt and answer, and the prompt alone has"
            f" {prompt_tokens} tokens. Raise it, or send `max_new_tokens` instead.",
            param="params.max_length",
        )
    return msgspec.structs.replace(request, max_tokens=max_length - prompt_tokens)


def _to_max_tokens(params: GenerateParams) -> int | None:
    limit = _named_limit(params)
    if limit is None:
        return USUAL_MAX_TOKENS
    return None if limit == -1 else limit


def _named_limit(params: GenerateParams) -> int | None:
    """What is said of the answer alone. It goes before `max_length`, as with transformers."""
    return _same(
        max_tokens=params.max_tokens, max_new_tokens=params.max_new_tokens, n_predict=params.n_predict
    )


def _to_sampling(params: GenerateParams) -> SamplingSettings:
    return msgspec.structs.replace(
        to_sampling(params),
        temperature=_to_temperature(params),
        repetition_penalty=_same(
            repetition_penalty=params.repetition_penalty, repeat_penalty=params.repeat_penalty
        ),
        # llama.cpp's way to say "any".
        seed=None if params.seed == -1 else params.seed,
    )


def _to_temperature(params: GenerateParams) -> float | None:
    """None: as the model's defaults say. Without `do_sample` transformers looks at no temperature at all; a
    request that names one means it."""
    temperature = _same(temperature=params.temperature, temp=params.temp)
    if params.do_sample is None:
        return temperature
    if params.do_sample:
        if temperature == 0:
            raise _unsupported("temperature", "`do_sample` is true, and 0 takes the likeliest token")
        return 1.0 if temperature is None else temperature
    if temperature not in (None, 0, 1):  # 1 stands in every GenerationConfig
        raise _unsupported("temperature", "`do_sample` is false, which takes the likeliest token")
    return 0.0


def _with_stop_strings(params: GenerateParams) -> GenerateParams:
    more = [params.stop_strings] if isinstance(params.stop_strings, str) else params.stop_strings
    stop = [params.stop] if isinstance(params.stop, str) else params.stop
    return params.model_copy(update={"stop": [*stop, *more]})


def _same(**given: T | None) -> T | None:
    """The value of a parameter that has several names; None where it has none.

    Raises:
        InvalidRequest: its names have different values.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if len(set(values.values())) > 1:
        names = " and ".join(f"`{name}`" for name in values)
        raise InvalidRequest(f"{names} mean the same, and differ; send one.", param=f"params.{min(values)}")
    return next(iter(values.values()), None)


async def _texts(events: AsyncGenerator[ChatEvent, None]) -> AsyncGenerator[str, None]:
    """The answer in pieces; closes `events`.

    Raises:
        ReportedError: the events end in a Failure.
    """
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Failure):
                raise ReportedError(event.error)
            if isinstance(event, AnswerText) and event.text:
                yield event.text
