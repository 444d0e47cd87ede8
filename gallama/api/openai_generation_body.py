"""What the bodies of POST /v1/chat/completions and POST /v1/completions share: how to choose tokens, what the
answer must be, and when it ends.

A value that is not honoured is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from gallama.api.error_answers import shown
from gallama.api.request_bodies import StrictBody
from gallama.conversation import Constraint, UnsupportedPolicy
from gallama.errors import InvalidRequest, UnsupportedValue
from gallama.generation import SamplingSettings

MAX_CHOICES = 16
MAX_STOP_WORDS = 16
MAX_BIASED_TOKENS = 1024

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
StopWord = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
ConstraintEngine = Literal["auto", "llguidance", "lm-format-enforcer", "outlines"]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]

_HINTS = {
    "functions": "Use `tools`.",
    "function_call": "Use `tool_choice`.",
}


class TextFormatBody(StrictBody):
    type: Literal["text"]


class JsonObjectFormatBody(StrictBody):
    type: Literal["json_object"]


class JsonSchemaBody(StrictBody):
    name: FunctionName
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class JsonSchemaFormatBody(StrictBody):
    type: Literal["json_schema"]
    json_schema: JsonSchemaBody


class StreamOptionsBody(StrictBody):
    include_usage: bool = False
    include_obfuscation: bool = False


class GrammarBody(StrictBody):
    syntax: Literal["lark", "gbnf"]
    definition: str


class GenerationBody(StrictBody):
    # OpenAI's
    model: Annotated[str, Field(min_length=1, max_length=512)]
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASED_TOKENS)] = Field(default={})
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    presence_penalty: Penalty | None = None
    response_format: (
        Annotated[TextFormatBody | JsonObjectFormatBody | JsonSchemaFormatBody, Field(discriminator="type")]
        | None
    ) = None
    seed: Seed | None = None
    stop: StopWord | list[StopWord] = Field(default=[])
    stream: bool = False
    stream_options: StreamOptionsBody | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: str | None = None
    """Changes no answer."""
    # Ours
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    explain: bool = False
    grammar: GrammarBody | None = None
    guided_decoding_backend: ConstraintEngine = "auto"
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    on_unsupported: UnsupportedPolicy | None = None
    prefix_strings: str | Annotated[list[str], Field(min_length=1)] | None = None
    regex_pattern: str | None = None
    regex_prefix_pattern: str | None = None
    repetition_guard: bool = False
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    return_stop_word: bool = False
    stop_words: StopWord | list[StopWord] = Field(default=[])
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None


def refuse_unhonoured(name: str, value: object, honoured: Sequence[object]) -> None:
    """
    Raises:
        UnsupportedValue: the value of the field is given, and none of those that are honoured.
    """
    # By type too: 0 is not False.
    if value is None or any(type(value) is type(each) and value == each for each in honoured):
        return
    way_out = f"Use one of: {', '.join(map(str, honoured))}." if honoured else f"Leave `{name}` out."
    raise UnsupportedValue(
        f"`{name}` is not supported with this value. {_HINTS.get(name, way_out)}", param=name
    )


def check_stream_options(body: GenerationBody) -> None:
    """
    Raises:
        InvalidRequest: there are options of a stream, but there is to be none.
        UnsupportedValue: one of them is not honoured.
    """
    if body.stream_options is None:
        return
    if not body.stream:
        raise InvalidRequest("`stream_options` is only allowed with `stream`: true.", param="stream_options")
    refuse_unhonoured("stream_options.include_obfuscation", body.stream_options.include_obfuscation, (False,))


def to_constraints(body: GenerationBody) -> tuple[Constraint, ...]:
    """What must hold for the answer's text."""
    prefixes = [body.prefix_strings] if isinstance(body.prefix_strings, str) else body.prefix_strings
    constraints = []
    match body.response_format:
        case JsonObjectFormatBody():
            constraints.append(Constraint(kind="json_object", param="response_format"))
        case JsonSchemaFormatBody(json_schema=named):
            param = "response_format.json_schema.schema"
            constraints.append(
                Constraint(kind="json_schema", source=named.schema_, strict=named.strict, param=param)
            )
    if body.regex_pattern is not None:
        constraints.append(Constraint(kind="regex", source=body.regex_pattern, param="regex_pattern"))
    if body.regex_prefix_pattern is not None:
        pattern = body.regex_prefix_pattern
        constraints.append(Constraint(kind="regex_prefix", source=pattern, param="regex_prefix_pattern"))
    if prefixes is not None:
        constraints.append(Constraint(kind="prefix", source=prefixes, param="prefix_strings"))
    if body.choice is not None:
        constraints.append(Constraint(kind="choice", source=body.choice, param="choice"))
    if body.grammar is not None:
        constraints.append(Constraint(kind="grammar", source=body.grammar.model_dump(), param="grammar"))
    return tuple(constraints)


def to_sampling(body: GenerationBody) -> SamplingSettings:
    """
    Raises:
        InvalidRequest: `logit_bias` has a key that is no token's number.
    """
    return SamplingSettings(
        temperature=body.temperature,
        top_p=body.top_p,
        # -1 is how other servers write "all tokens".
        top_k=0 if body.top_k == -1 else body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        seed=body.seed,
        logit_bias={_to_token_id(text): bias for text, bias in body.logit_bias.items()},
    )


def _to_token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise InvalidRequest(f"{shown(text)} is not a token's number.", param="logit_bias")
    return int(text)


def to_stop_words(body: GenerationBody) -> tuple[str, ...]:
    """
    Raises:
        InvalidRequest: there are too many.
    """
    fields = [[words] if isinstance(words, str) else words for words in (body.stop, body.stop_words)]
    words = tuple(dict.fromkeys(word for field in fields for word in field))
    if len(words) > MAX_STOP_WORDS:
        raise InvalidRequest(
            f"There are {len(words)} stop words; at most {MAX_STOP_WORDS} may be.", param="stop"
        )
    return words
