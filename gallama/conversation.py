"""What a client means: a chat request in, chat events out. Nothing here knows HTTP or tokens.

Every API surface translates its own format to `ChatRequest` and from `ChatEvent`. A stream is

    Accepted, (ReasoningText | AnswerText | ToolCallStarted | ToolArguments | Finished)*, Completed

or, of a dry run,    Accepted, Explained, Completed

or ends early in `Failure`. `collect_reply` makes the whole answer of it; there is no other path.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import Struct

from gallama.errors import ErrorReport, ReportedError
from gallama.generation import SamplingSettings

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls"]
ConstraintKind = Literal[
    "json_object", "json_schema", "regex", "regex_prefix", "prefix", "choice", "grammar", "template", "tools"
]
UnsupportedPolicy = Literal["reject", "validate", "weaken"]
"""What becomes of a keyword that no grammar can hold: the request is refused, the finished answer is
checked and made again where it fails, or it is checked and returned as it is."""


class ToolCall(Struct, frozen=True, kw_only=True):
    id: str
    name: str
    arguments: str
    """JSON text of an object."""


class Message(Struct, frozen=True, kw_only=True):
    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a tool's message: the call that it answers."""
    name: str | None = None
    """Of a tool's message: the tool; else the participant."""
    reasoning: str | None = None


class ToolSpec(Struct, frozen=True, kw_only=True):
    name: str
    description: str = ""
    parameters: Mapping[str, Any] = {}
    """JSON Schema of the arguments, an object; {}: it takes none."""
    strict: bool = False


class ToolChoice(Struct, frozen=True, kw_only=True):
    """Whether tools may or must be called, and which.

    A named choice is `required` with one name allowed.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    allowed: tuple[str, ...] | None = None
    """None: all tools."""


class Constraint(Struct, frozen=True, kw_only=True):
    """What the answer's text must be.

    source, by kind: json_schema: the schema; regex, regex_prefix: the pattern; prefix, choice: a list of
    strings; json_object: None; grammar: {"syntax": "lark" | "gbnf", "definition": text}.
    """

    kind: ConstraintKind
    source: Any = None
    strict: bool = False
    param: str = "response_format"
    """The request's field that asked for it, for error messages."""


class RawPrompt(Struct, frozen=True, kw_only=True):
    """A text that the model goes on with as it stands, with no template around it."""

    text: str = ""
    """Control tokens that are written in it are recognised."""
    token_ids: tuple[int, ...] = ()
    """Instead of a text: all of the prompt."""
    suffix: str | None = None
    """What follows the answer, for models that fill in."""
    echo: bool = False
    """Whether the answer begins with the prompt."""


class ChatRequest(Struct, frozen=True, kw_only=True):
    request_id: str
    model: str
    messages: tuple[Message, ...] = ()
    prompt: RawPrompt | None = None
    """Instead of messages; then there are no tools and no thinking either."""
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    constraints: tuple[Constraint, ...] = ()
    """All of them hold for the answer's text; where tools may be called too, a call stands instead of it."""
    thinking_template: str | None = None
    """XML; what the model thinks before it answers has this shape."""
    on_unsupported: UnsupportedPolicy | None = None
    """None: "reject" for what is marked strict, else "validate"."""
    constraint_engine: str = "auto"
    repetition_guard: bool = False
    """Whether a string that repeats itself without end is closed by force."""
    explain: bool = False
    """Whether to record which part of the answer was sampled and which forced."""
    dry_run: bool = False
    """Only explain what would be done: an `Explained` instead of an answer."""
    sampling: SamplingSettings = SamplingSettings()
    max_tokens: int | None = None
    """None: as many as the context holds."""
    stop: tuple[str, ...] = ()
    return_stop_word: bool = False
    choices: int = 1
    logprobs: int | None = None
    """How many alternatives to report for each token; None: no log probabilities at all."""
    leading_prompt: str = ""
    """Text that the assistant's turn begins with; not part of the answer."""
    reasoning_effort: str | None = None


class LogprobEntry(Struct, frozen=True):
    """One token of the answer, or of the prompt that is echoed in front of it.

    `token` is its text, with U+FFFD where bytes are no whole character.
    """

    token: str
    token_bytes: bytes
    logprob: float | None
    """None: of the first token of a prompt that is echoed, which nothing foretells."""
    top: tuple[tuple[str, bytes, float], ...] = ()


class KeywordPlace(Struct, frozen=True, kw_only=True):
    """A keyword of a JSON Schema in a request."""

    param: str
    """The request's field that holds the schema."""
    pointer: str
    """JSON pointer (RFC 6901) from the schema's root to the keyword's value."""
    keyword: str


class Guarantee(Struct, frozen=True, kw_only=True):
    """What held for a constrained answer, and how; see docs/guarantees.md."""

    kind: ConstraintKind
    beside: tuple[ConstraintKind, ...] = ()
    """What else held: a template in front of the answer, what bound its text beside tools."""
    engine: str
    complete: bool
    """False when a limit or a stop word cut the answer before the constraint was fulfilled."""
    sampled_tokens: int
    forced_tokens: int
    by: Literal["grammar", "grammar+validation"] = "grammar"
    validated_keywords: tuple[KeywordPlace, ...] = ()
    """What the grammar could not hold, so that the finished value was checked for it."""
    valid: bool = True
    """False only where the request allows it: "on_unsupported": "weaken"."""
    attempts: int = 1


class Span(Struct, frozen=True, kw_only=True):
    """A run of tokens that came about in one way."""

    text: str
    """As the model wrote it: with the marks around calls and thoughts, control tokens by name."""
    tokens: int
    by: Literal["sampled", "forced"]
    """Chosen by the model, or left no choice by the grammar."""
    constraint: ConstraintKind | None
    """What held for it; None: the model was free."""


class Explanation(Struct, frozen=True, kw_only=True):
    """What would be done for a request."""

    prompt: str
    prompt_tokens: int
    max_tokens: int
    """Tokens that the answer may have, thinking included."""
    dialect: str
    kind: ConstraintKind | None
    """What binds the answer, if anything."""
    beside: tuple[ConstraintKind, ...] = ()
    engine: str | None = None
    grammar: str | None = None
    """As the engine gets it."""
    by: Literal["grammar", "grammar+validation"] | None = None
    validated_keywords: tuple[KeywordPlace, ...] = ()
    compile_milliseconds: float | None = None
    """None: nothing was compiled; near 0: it was in the cache."""
    thinking_tokens: int | None = None
    """Tokens that the block of a thinking template may have."""


class Usage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that were in the cache."""
    reasoning_tokens: int = 0
    accepted_draft_tokens: int | None = None
    """Tokens that were guessed ahead and stand in the answer; None: the model's tokens are not guessed."""
    rejected_draft_tokens: int | None = None
    """Those that were guessed in vain; they count as nothing else."""


class Accepted(Struct, frozen=True, tag=True):
    """The request is sound and will be generated. Errors before this one become an HTTP status."""

    prompt_tokens: int


class ReasoningText(Struct, frozen=True, tag=True):
    choice: int
    text: str
    field_index: int | None = None
    """Of text that stands in a leaf of a thinking template: the leaf's number in this answer, from 0."""
    field_path: str = ""
    """The leaf's place: names of elements, joined by dots."""


class AnswerText(Struct, frozen=True, tag=True):
    choice: int
    text: str
    logprobs: tuple[LogprobEntry, ...] = ()


class ToolCallStarted(Struct, frozen=True, tag=True):
    choice: int
    call_index: int
    call_id: str
    name: str


class ToolArguments(Struct, frozen=True, tag=True):
    """A piece of the JSON text of a call's arguments; all pieces together parse."""

    choice: int
    call_index: int
    text: str


class Finished(Struct, frozen=True, tag=True):
    """One choice has ended."""

    choice: int
    reason: FinishReason
    guarantee: Guarantee | None = None
    spans: tuple[Span, ...] | None = None
    """Where the request asked for an explanation."""


class Explained(Struct, frozen=True, tag=True):
    """The result of a dry run."""

    explanation: Explanation


class Completed(Struct, frozen=True, tag=True):
    """All choices have ended; the stream ends here."""

    usage: Usage


class Failure(Struct, frozen=True, tag=True):
    """The stream ends here, without an answer to rely on."""

    error: ErrorReport


ChatEvent = (
    Accepted
    | ReasoningText
    | AnswerText
    | ToolCallStarted
    | ToolArguments
    | Finished
    | Explained
    | Completed
    | Failure
)


@dataclass(slots=True)
class ThinkingField:
    """What stands in one leaf of a thinking template."""

    path: str
    text: str = ""


@dataclass(slots=True)
class ChoiceReply:
    """One whole answer."""

    text: str = ""
    reasoning: str = ""
    thinking_fields: list[ThinkingField] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    guarantee: Guarantee | None = None
    spans: tuple[Span, ...] | None = None

    def add_reasoning(self, piece: ReasoningText) -> None:
        self.reasoning += piece.text
        if piece.field_index is None:
            return
        if piece.field_index == len(self.thinking_fields):
            self.thinking_fields.append(ThinkingField(path=piece.field_path))
        self.thinking_fields[piece.field_index].text += piece.text


@dataclass(slots=True)
class Reply:
    choices: list[ChoiceReply]
    usage: Usage
    explanation: Explanation | None = None


class _ReplyBuilder:
    """Adds up the events of one stream."""

    def __init__(self) -> None:
        self.choices: dict[int, ChoiceReply] = {}
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)
        self.explanation: Explanation | None = None

    def add(self, event: ChatEvent) -> None:
        match event:
            case ReasoningText():
                self._choice(event.choice).add_reasoning(event)
            case AnswerText():
                choice = self._choice(event.choice)
                choice.text += event.text
                choice.logprobs.extend(event.logprobs)
            case ToolCallStarted():
                calls = self._choice(event.choice).tool_calls
                calls.append(ToolCall(id=event.call_id, name=event.name, arguments=""))
            case ToolArguments():
                calls = self._choice(event.choice).tool_calls
                call = calls[event.call_index]
                calls[event.call_index] = ToolCall(
                    id=call.id, name=call.name, arguments=call.arguments + event.text
                )
            case Finished():
                choice = self._choice(event.choice)
                choice.finish_reason, choice.guarantee = event.reason, event.guarantee
                choice.spans = event.spans
            case Explained():
                self.explanation = event.explanation
            case Completed():
                self.usage = event.usage
            case Failure():
                raise ReportedError(event.error)
            case Accepted():
                pass

    def _choice(self, index: int) -> ChoiceReply:
        return self.choices.setdefault(index, ChoiceReply())

    def reply(self) -> Reply:
        choices = [self.choices[index] for index in sorted(self.choices)]
        return Reply(choices=choices, usage=self.usage, explanation=self.explanation)


async def collect_reply(events: AsyncIterable[ChatEvent]) -> Reply:
    """The whole answer that a stream of events adds up to.

    Raises:
        ReportedError: the stream ended in a `Failure`.
    """
    builder = _ReplyBuilder()
    async for event in events:
        builder.add(event)
    return builder.reply()
