"""The body of POST /v1/chat/completions, and what it means.

Every field of OpenAI's is here, and ours beside them. A value that is not honoured is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from gallama.api.error_answers import shown
from gallama.api.openai_generation_body import (
    FunctionName,
    GenerationBody,
    check_stream_options,
    refuse_unhonoured,
    to_constraints,
    to_sampling,
    to_stop_words,
)
from gallama.api.request_bodies import StrictBody
from gallama.conversation import ChatRequest, Constraint, Message, ToolCall, ToolChoice, ToolSpec
from gallama.errors import InvalidRequest, UnsupportedValue

T = TypeVar("T")

HONOURED_VALUES: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": (),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""The fields of which this version does not honour every value, and the values that it does."""


class ContentPartBody(StrictBody):
    type: str
    text: str | None = None
    # What parts of other types carry; their type is refused by name.
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None
    prompt_cache_breakpoint: Any = None


class CalledFunctionBody(StrictBody):
    name: str
    arguments: str


class ToolCallBody(StrictBody):
    id: Annotated[str, Field(min_length=1)]
    type: str = "function"
    function: CalledFunctionBody | None = None
    custom: Any = None
    index: int | None = None
    """Left over in calls that a client put together from a stream; says nothing."""


class MessageBody(StrictBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPartBody] | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] = Field(default=[])
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What assistants' messages of other servers may carry.
    refusal: Any = None
    annotations: list[Any] = Field(default=[])
    audio: Any = None
    function_call: Any = None


class FunctionBody(StrictBody):
    name: FunctionName
    description: str = ""
    parameters: dict[str, Any] = Field(default={})
    strict: bool = False


class ToolBody(StrictBody):
    type: str
    function: FunctionBody | None = None
    custom: Any = None


class FunctionNameBody(StrictBody):
    name: str


class ToolReferenceBody(StrictBody):
    """One function, in the form of Chat Completions or in that of Responses."""

    type: Literal["function"]
    function: FunctionNameBody | None = None
    name: str | None = None


class AllowedToolsBody(StrictBody):
    mode: Literal["auto", "required"]
    tools: list[ToolReferenceBody]


class AllowedToolsChoiceBody(StrictBody):
    """Some of the tools, in the form of Chat Completions or in that of Responses."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolsBody | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[ToolReferenceBody] | None = None


class ChatCompletionBody(GenerationBody):
    # OpenAI's
    messages: Annotated[list[MessageBody], Field(min_length=1)]
    logprobs: bool = False
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[ToolReferenceBody | AllowedToolsChoiceBody, Field(discriminator="type")]
        | None
    ) = None
    tools: list[ToolBody] = Field(default=[])
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # OpenAI's, of which only the usual value is honoured
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    # OpenAI's, which change no answer
    metadata: dict[str, str] = Field(default={})
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Ours
    leading_prompt: str = ""
    return_thinking: bool | Literal["separate", "fields"] = "separate"
    thinking_template: Annotated[str, Field(min_length=1)] | None = None


def to_chat_request(body: ChatCompletionBody, *, request_id: str, model: str) -> ChatRequest:
    """What the body means.

    Args:
        model: the name of the model that answers, which `body.model` may not be.

    Raises:
        InvalidRequest: the fields contradict each other.
        UnsupportedValue: a value is not honoured.
    """
    for name, honoured in HONOURED_VALUES.items():
        refuse_unhonoured(name, getattr(body, name), honoured)
    check_stream_options(body)
    tools = _to_tools(body.tools)
    tool_choice = _to_tool_choice(body.tool_choice, [tool.name for tool in tools])
    return ChatRequest(
        request_id=request_id,
        model=model,
        messages=tuple(_to_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        constraints=_to_constraints(body, demands_call=bool(tools) and tool_choice.mode == "required"),
        thinking_template=body.thinking_template,
        on_unsupported=body.on_unsupported,
        constraint_engine=body.guided_decoding_backend,
        repetition_guard=body.repetition_guard,
        explain=body.explain,
        sampling=to_sampling(body),
        max_tokens=_to_max_tokens(body),
        stop=to_stop_words(body),
        return_stop_word=body.return_stop_word,
        choices=body.n,
        logprobs=_to_logprobs(body),
        leading_prompt=body.leading_prompt,
        reasoning_effort=body.reasoning_effort,
    )


def _to_message(body: MessageBody, path: str) -> Message:
    _check_fields_of_role(body, path)
    content = _to_text(body.content, f"{path}.content")
    return Message(
        role="system" if body.role == "developer" else body.role,
        content=content,
        tool_calls=_to_tool_calls(body.tool_calls, f"{path}.tool_calls"),
        tool_call_id=body.tool_call_id,
        name=body.name,
        reasoning=body.reasoning_content,
    )


def _check_fields_of_role(body: MessageBody, path: str) -> None:
    for name in ("refusal", "audio", "function_call"):
        refuse_unhonoured(f"{path}.{name}", getattr(body, name), ())
    if body.annotations:
        refuse_unhonoured(f"{path}.annotations", body.annotations, ([],))
    if body.role == "tool" and not body.tool_call_id:
        raise InvalidRequest("A tool's message must say which call it answers.", param=f"{path}.tool_call_id")
    if body.role != "tool" and body.tool_call_id is not None:
        raise InvalidRequest("Only a tool's message answers a call.", param=f"{path}.tool_call_id")
    if body.role != "assistant" and (body.tool_calls or body.reasoning_content is not None):
        field = "tool_calls" if body.tool_calls else "reasoning_content"
        raise InvalidRequest(f"Only an assistant's message has `{field}`.", param=f"{path}.{field}")
    if body.content is None and not body.tool_calls:
        raise InvalidRequest("The message has no content.", param=f"{path}.content")


def _to_text(content: str | list[ContentPartBody] | None, path: str) -> str:
    if not isinstance(content, list):
        return content or ""
    return "\n".join(_part_text(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part_text(part: ContentPartBody, path: str) -> str:
    if part.type != "text":
        raise UnsupportedValue(
            f"Content parts of type {shown(part.type)} are not supported; only text is.", param=f"{path}.type"
        )
    for name in ("image_url", "input_audio", "file", "refusal", "prompt_cache_breakpoint"):
        refuse_unhonoured(f"{path}.{name}", getattr(part, name), ())
    if part.text is None:
        raise InvalidRequest("The part has no text.", param=f"{path}.text")
    return part.text


def _to_tool_calls(bodies: Sequence[ToolCallBody], path: str) -> tuple[ToolCall, ...]:
    calls: list[ToolCall] = []
    for i, body in enumerate(bodies):
        function = _required_function(body.type, body.function, f"{path}[{i}]")
        if body.id in (call.id for call in calls):
            raise InvalidRequest(
                f"The message has two calls with the id {shown(body.id)}.", param=f"{path}[{i}].id"
            )
        calls.append(ToolCall(id=body.id, name=function.name, arguments=function.arguments))
    return tuple(calls)


def _required_function(kind: str, function: T | None, path: str) -> T:
    if kind != "function":
        raise UnsupportedValue(
            f"Tools of type {shown(kind)} are not supported; only functions are.", param=f"{path}.type"
        )
    if function is None:
        raise InvalidRequest("There is no `function`.", param=f"{path}.function")
    return function


def _to_tools(bodies: Sequence[ToolBody]) -> tuple[ToolSpec, ...]:
    tools: dict[str, ToolSpec] = {}
    for i, body in enumerate(bodies):
        function = _required_function(body.type, body.function, f"tools[{i}]")
        if function.name in tools:
            raise InvalidRequest(
                f"Two tools are called {function.name!r}.", param=f"tools[{i}].function.name"
            )
        tools[function.name] = ToolSpec(
            name=function.name,
            description=function.description,
            parameters=function.parameters,
            strict=function.strict,
        )
    return tuple(tools.values())


def _to_tool_choice(
    body: str | ToolReferenceBody | AllowedToolsChoiceBody | None, offered: Sequence[str]
) -> ToolChoice:
    match body:
        case None | "auto":
            return ToolChoice(mode="auto")
        case "none":
            return ToolChoice(mode="none")
        case ToolReferenceBody():
            return ToolChoice(mode="required", allowed=(_offered_name(body, offered, "tool_choice"),))
        case AllowedToolsChoiceBody():
            return _to_allowed_tools(body, offered)
    if not offered:
        raise InvalidRequest("`tool_choice` demands a call, but there are no `tools`.", param="tool_choice")
    return ToolChoice(mode="required")


def _to_allowed_tools(body: AllowedToolsChoiceBody, offered: Sequence[str]) -> ToolChoice:
    nested = body.allowed_tools
    mode = nested.mode if nested else body.mode
    references = nested.tools if nested else body.tools
    if mode is None or not references or (nested and (body.mode or body.tools)):
        raise InvalidRequest(
            "`allowed_tools` needs `mode` and at least one entry in `tools`, once.",
            param="tool_choice.allowed_tools",
        )
    names = [
        _offered_name(each, offered, f"tool_choice.allowed_tools.tools[{i}]")
        for i, each in enumerate(references)
    ]
    return ToolChoice(mode=mode, allowed=tuple(dict.fromkeys(names)))


def _offered_name(body: ToolReferenceBody, offered: Sequence[str], path: str) -> str:
    name = body.function.name if body.function else body.name
    if name is None or (body.function and body.name):
        raise InvalidRequest('Name one function: {"name": ...}.', param=f"{path}.function")
    if name not in offered:
        raise InvalidRequest(
            f"{shown(name)} is not among the request's `tools`.", param=f"{path}.function.name"
        )
    return name


def _to_constraints(body: ChatCompletionBody, *, demands_call: bool) -> tuple[Constraint, ...]:
    """What must hold for the answer's text.

    With OpenAI a `response_format` beside a demanded call is for the answers in text that come later in the
    conversation: it says nothing about this one, which has none.
    """
    constraints = to_constraints(body)
    if not demands_call:
        return constraints
    for constraint in constraints:
        if not constraint.param.startswith("response_format"):
            raise InvalidRequest(
                f"`tool_choice` demands a call, and `{constraint.param}` says what the answer's text must be;"
                ' an answer cannot be both. Leave one out, or let `tool_choice` be "auto".',
                param=constraint.param,
            )
    return ()


def _to_max_tokens(body: ChatCompletionBody) -> int | None:
    limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise InvalidRequest("`max_tokens` and `max_completion_tokens` differ; send one.", param="max_tokens")
    return next(iter(limits), None)


def _to_logprobs(body: ChatCompletionBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs`: true.", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
