"""The body of POST /v1/completions, and what it means.

OpenAI's fields, and those of ours that are not a conversation's. A value that is not honoured is refused by
name.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, Tag

from gallama.api.openai_generation_body import (
    GenerationBody,
    check_stream_options,
    to_constraints,
    to_sampling,
    to_stop_words,
)
from gallama.api.request_bodies import TokenIds
from gallama.api.texts_or_tokens import BY_FORM, one_by_one
from gallama.conversation import ChatRequest, RawPrompt
from gallama.errors import InvalidRequest, UnsupportedValue

MAX_ANSWERS = 256
"""To all prompts of a request together."""

Prompts = Field(min_length=1, max_length=MAX_ANSWERS)
TextAsTokens = Annotated[TokenIds, Field(min_length=1)]


class CompletionBody(GenerationBody):
    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Prompts, Tag("texts")]
        | Annotated[TextAsTokens, Tag("token ids")]
        | Annotated[list[TextAsTokens], Prompts, Tag("lists of token ids")],
        BY_FORM,
    ]
    best_of: int | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] = 16
    suffix: str | None = None


def to_chat_requests(body: CompletionBody, *, request_id: str, model: str) -> list[ChatRequest]:
    """What the body means: one request for each prompt, in their order.

    Args:
        model: the name of the model that answers, which `body.model` may not be.

    Raises:
        InvalidRequest: the fields contradict each other.
        UnsupportedValue: a value is not honoured.
    """
    prompts = [_to_prompt(body, given) for given in one_by_one(body.prompt)]
    _check_counts(body, len(prompts))
    check_stream_options(body)
    constraints, sampling, stop = to_constraints(body), to_sampling(body), to_stop_words(body)
    return [
        ChatRequest(
            request_id=request_id,
            model=model,
            prompt=prompt,
            constraints=constraints,
            on_unsupported=body.on_unsupported,
            constraint_engine=body.guided_decoding_backend,
            repetition_guard=body.repetition_guard,
            explain=body.explain,
            sampling=sampling,
            max_tokens=body.max_tokens,
            stop=stop,
            return_stop_word=body.return_stop_word,
            choices=body.n,
            logprobs=body.logprobs,
        )
        for prompt in prompts
    ]


def _to_prompt(body: CompletionBody, given: str | tuple[int, ...]) -> RawPrompt:
    return RawPrompt(
        text=given if isinstance(given, str) else "",
        token_ids=() if isinstance(given, str) else given,
        suffix=body.suffix,
        echo=body.echo,
    )


def _check_counts(body: CompletionBody, prompts: int) -> None:
    if body.best_of not in (None, body.n):
        raise UnsupportedValue(
            f"`best_of` is {body.best_of} and `n` is {body.n}; all answers that are made are returned. Leave"
            " `best_of` out, or set it to `n`.",
            param="best_of",
        )
    if prompts * body.n > MAX_ANSWERS:
        raise InvalidRequest(
            f"There are {prompts} prompts with {body.n} answers each; at most {MAX_ANSWERS} answers may be"
            " asked for at once.",
            param="n",
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest(
            "With `max_tokens`: 0 and without `echo` there is no answer.", param="max_tokens"
        )
