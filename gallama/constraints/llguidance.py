"""Constraints through llguidance: specs become its Lark dialect, its matcher becomes our `State`.

Facts about llguidance 1.9 that the code below rests on (all measured):
- Errors never raise. A matcher stores them, and a failing mask silently holds only the end token, so
  `is_error` is asked after construction and after every mask.
- `try_consume_tokens` and `validate_tokens` leave the matcher usable after a refusal; `consume_token` not.
- `deep_copy` costs microseconds and shares what the root has learned.
- A quoted literal never matches a control token, and text never admits one: a control token must be named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from gallama.constraints.admission import walk_schema
from gallama.constraints.envelope import ToolEnvelope
from gallama.constraints.specs import (
    CallableTool,
    ChoiceSpec,
    ConstraintSpec,
    RegexSpec,
    Schema,
    SchemaSpec,
    ToolsSpec,
)
from gallama.errors import (
    ConstraintFailed,
    ConstraintTooComplex,
    GallamaError,
    InvalidConstraint,
    UnsupportedConstraint,
)
from gallama.generation import StateStatus, Vocabulary

NAME = "llguidance"

_ANYTHING = "/(?s:.*)/"
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)
_COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}

_SHORT_ESCAPES = '"\\bfnrt'
# In a schema's JSON text: control characters, and patterns that may name some.
_NEEDS_UNICODE_ESCAPES = re.compile(r"\\u00[01]|\x7f|\\\\[xuc0pP]")

# Lark's strings are JSON's, without these two escapes.
_LARK_ESCAPES = {r"\b": r"\u0008", r"\f": r"\u000c"}
# In front of a complaint and behind it: where in the Lark text, which the client has never seen.
_PLACE_IN_LARK = re.compile(
    r"\Aat \d+\(\d+\): (?:failed to compile JSON schema: )?|\n\s*\d+ \| .*\Z", re.DOTALL
)
_BEYOND_LIMITS = re.compile(r"too (complex|large|many|deep|big)|[Ll]imit|fuel|recursion|TooComplex")

# What llguidance says -> the keyword it is about; group 1, where there is one, is that keyword's value.
_COMPLAINTS: tuple[tuple[re.Pattern[str], str, type[GallamaError]], ...] = (
    (re.compile(r"Unsatisfiable schema"), "", InvalidConstraint),
    (re.compile(r"Invalid type: (.*)"), "type", InvalidConstraint),
    (re.compile(r"Pointer '(.*)' does not exist"), "$ref", InvalidConstraint),
    (re.compile(r"Unknown format: (.*)"), "format", UnsupportedConstraint),
    (re.compile(r"oneOf constraints are not supported"), "oneOf", UnsupportedConstraint),
    (re.compile(r"patternProperty regexes"), "patternProperties", UnsupportedConstraint),
    (
        re.compile(r"not supported|lookarounds|backreferences|regex parse error"),
        "pattern",
        UnsupportedConstraint,
    ),
    (_BEYOND_LIMITS, "", ConstraintTooComplex),
)


class _TokenizerView:
    """A `Vocabulary` as llguidance wants to see a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        names = {token_id: name for name, token_id in vocabulary.control_tokens.items()}
        self.tokens = [
            b"\xff" + names[token_id].encode() if token_id in names else text
            for token_id, text in enumerate(vocabulary.tokens)
        ]
        self.special_token_ids = sorted(names)
        self.eos_token_id = vocabulary.end_token_id
        self.bos_token_id: int | None = None
        self._encode = vocabulary.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text)


class LLGuidanceBackend:
    """Compiles specs for one vocabulary. Safe to use from many threads."""

    name = NAME

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_TokenizerView(vocabulary)),
            eos_token=sorted(vocabulary.end_token_ids, key=lambda end: end != vocabulary.end_token_id),
        )
        self._mask_words = (len(vocabulary.tokens) + 31) // 32

    def compile(self, spec: ConstraintSpec) -> LLGuidanceCompiled:
        """Compile a spec, up to and including its first mask, so that later steps do not fail.

        Raises:
            InvalidConstraint: no text can satisfy it, or a part of it is malformed.
            UnsupportedConstraint: llguidance cannot hold it.
            ConstraintTooComplex: it needs more than llguidance's limits.
        """
        root = llguidance.LLMatcher(self._tokenizer, self._grammar(spec), log_level=0, limits=_LIMITS)
        if root.is_error():
            raise self._explain(root.get_error(), spec)
        first_mask = np.zeros(self._mask_words, dtype=np.int32)
        root.unsafe_compute_mask_ptr(first_mask.ctypes.data, first_mask.nbytes)
        if root.is_error():
            raise self._explain(root.get_error(), spec)
        return LLGuidanceCompiled(root)

    def _grammar(self, spec: ConstraintSpec) -> str:
        match spec:
            case SchemaSpec():
                return _lark(f"start: {_json(spec.schema, _COMPACT)}")
            case RegexSpec():
                pattern = f"(?:{spec.pattern})(?s:.*)" if spec.prefix_only else spec.pattern
                return llguidance.LLMatcher.grammar_from_regex(pattern)
            case ChoiceSpec():
                # One terminal, not a rule: its options are states of the lexer, and may be many thousands.
                options = " | ".join(_quoted(option) for option in spec.options)
                rest = f" {_ANYTHING}" if spec.prefix_only else ""
                return _lark(f"start: OPTION\nOPTION: ({options}){rest}")
            case ToolsSpec():
                return _lark(tools_grammar(spec, self._vocabulary.control_tokens))

    def _explain(self, complaint: str, spec: ConstraintSpec) -> GallamaError:
        complaint = _PLACE_IN_LARK.sub("", complaint.partition("\n<non-verbose/>")[0].strip())
        for pattern, keyword, error in _COMPLAINTS:
            if found := pattern.search(complaint):
                value = found.group(1) if pattern.groups and keyword else None
                param, pointer = self._locate(spec, keyword, value)
                where = f"`{pointer}` of `{param}`" if pointer else f"`{param}`"
                return error(f"{where} cannot be held: {_one_line(complaint)}.", param=param)
        param, _ = self._locate(spec, "", None)
        if "NoExtension" in complaint:
            return InvalidConstraint(
                f"`{param}` has no answer: it refers to itself without end.", param=param
            )
        return UnsupportedConstraint(f"`{param}` cannot be held: {_one_line(complaint)}.", param=param)

    def _locate(self, spec: ConstraintSpec, keyword: str, value: str | None) -> tuple[str, str]:
        """The request's field, and the JSON pointer inside it, that a complaint about a keyword means."""
        if not isinstance(spec, SchemaSpec | ToolsSpec):
            return spec.param, ""
        schemas = [(spec.param, spec.schema)] if isinstance(spec, SchemaSpec) else _tool_schemas(spec)
        guilty = [item for item in schemas if len(schemas) == 1 or self._refuses(item[1])] or schemas
        param, schema = guilty[0]
        return param, self._pointer_to(keyword, value, schema) if keyword else ""

    def _pointer_to(self, keyword: str, value: str | None, schema: Schema) -> str:
        places = [
            (f"{pointer}/{keyword}", subschema)
            for pointer, subschema in walk_schema(schema)
            if keyword in subschema and (value is None or _mentions(subschema[keyword], value))
        ]
        definitions = {
            name: schema[name]
            for name in ("$defs", "definitions")
            if isinstance(schema, Mapping) and name in schema
        }
        if len(places) > 1:
            refused = [
                place for place in places if self._refuses({**definitions, keyword: place[1][keyword]})
            ]
            places = refused or places
        return places[-1][0] if places else ""

    def _refuses(self, schema: Schema) -> bool:
        matcher = llguidance.LLMatcher(
            self._tokenizer, _lark(f"start: {_json(schema, _COMPACT)}"), log_level=0, limits=_LIMITS
        )
        return matcher.is_error()


class LLGuidanceCompiled:
    """A grammar that any number of answers can start from."""

    backend = NAME

    def __init__(self, root: llguidance.LLMatcher) -> None:
        self._root = root

    def start(self) -> LLGuidanceState:
        return LLGuidanceState(self._root.deep_copy())


class LLGuidanceState:
    """One sequence's place in an llguidance grammar; see `generation.State`."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @property
    def status(self) -> StateStatus:
        if self._matcher.is_error():
            return "failed"
        if self._matcher.is_stopped():
            return "must_end"
        return "may_end" if self._matcher.is_accepting() else "running"

    def mask(self, out: NDArray[np.int32]) -> bool:
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        self._refuse_error()
        return True

    def accepts(self, token_ids: Sequence[int]) -> int:
        return self._matcher.validate_tokens(list(token_ids))

    def advance(self, token_ids: Sequence[int]) -> int:
        taken = self._matcher.try_consume_tokens(list(token_ids))
        self._refuse_error()
        return taken

    def forced(self) -> list[int]:
        return self._matcher.compute_ff_tokens()

    def rollback(self, count: int) -> None:
        undone = self._matcher.rollback(count)
        assert undone, f"the matcher could not undo {count} tokens: {self._matcher.get_error()}"

    def clone(self) -> LLGuidanceState:
        return LLGuidanceState(self._matcher.deep_copy())

    def _refuse_error(self) -> None:
        if not self._matcher.is_error():
            return
        words = _one_line(self._matcher.get_error().partition("\n<non-verbose/>")[0])
        if _BEYOND_LIMITS.search(words):
            raise ConstraintTooComplex(
                f"The grammar became too complex in the middle of the answer: {words}."
            )
        raise ConstraintFailed(f"The constraint engine gave up in the middle of the answer: {words}.")


def tools_grammar(spec: ToolsSpec, control_tokens: Mapping[str, int]) -> str:
    r"""The Lark text of an answer with tool calls.

    With a trigger that is text, `head` is lazy: it ends at the first trigger, so that text that has
    written one goes on as a call. With a control token as trigger, text simply cannot contain it.
    """
    envelope = spec.envelope
    rules = [
        f"start: {_answer_rule(spec, control_tokens)}",
        f"call: {_literal(envelope.call_begin, control_tokens)} body",
        f"body: ({' | '.join(f'tool_{index}' for index in range(len(spec.tools)))})"
        f" {_literal(envelope.call_end, control_tokens)}",
        *_tool_rules(spec.tools, envelope, control_tokens),
    ]
    if spec.text_allowed:
        rules.append(_text_rule(envelope, control_tokens))
    return "\n".join(rules)


def _answer_rule(spec: ToolsSpec, control_tokens: Mapping[str, int]) -> str:
    envelope = spec.envelope
    between = _literal(envelope.between, control_tokens)
    more = f" ({between} call)*" if spec.many_calls else ""
    end = _literal(envelope.end, control_tokens)
    begin = _literal(envelope.begin, control_tokens)
    calls = f"{begin} call{more} {end}"
    if not spec.text_allowed:
        return calls
    if not envelope.text_before_calls:
        return f"{_literal(envelope.text_begin, control_tokens)} PLAIN | {calls}"
    if not _has_text_trigger(envelope, control_tokens):
        return f"{_ANYTHING} | {_ANYTHING} {calls}"
    opening = (envelope.begin + envelope.call_begin).removeprefix(envelope.trigger)
    return f"{_ANYTHING} | head {_literal(opening, control_tokens)} body{more} {end}"


def _tool_rules(
    tools: Sequence[CallableTool], envelope: ToolEnvelope, control_tokens: Mapping[str, int]
) -> Iterator[str]:
    layout = {
        "whitespace_flexible": False,
        "item_separator": envelope.item_separator,
        "key_separator": envelope.key_separator,
    }
    for index, tool in enumerate(tools):
        opening = _literal(tool.name + envelope.name_end, control_tokens)
        yield f"tool_{index}: {opening} {_json(tool.schema, layout)}"


def _text_rule(envelope: ToolEnvelope, control_tokens: Mapping[str, int]) -> str:
    if envelope.text_before_calls:
        return f"head[lazy]: {_ANYTHING} {_quoted(envelope.trigger)}"
    if envelope.text_begin or not _has_text_trigger(envelope, control_tokens):
        return f"PLAIN: {_ANYTHING}"
    # The answer is a call from its first byte or it is none: the family writes no text in front of calls.
    trigger = re.sub(r"([^\w\s])", r"\\\1", envelope.trigger)
    return f"PLAIN: {_ANYTHING} & ~/{trigger}(?s:.*)/"


def _has_text_trigger(envelope: ToolEnvelope, control_tokens: Mapping[str, int]) -> bool:
    return envelope.trigger not in control_tokens


def _literal(text: str, control_tokens: Mapping[str, int]) -> str:
    """Lark for a fixed text, with the control tokens in it by id."""
    if not text:
        return ""
    names = sorted((name for name in control_tokens if name and name in text), key=len, reverse=True)
    if not names:
        return _quoted(text)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return " ".join(
        f"<[{control_tokens[part]}]>" if part in control_tokens else _quoted(part) for part in parts if part
    )


def _quoted(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(r"\\.", lambda escape: _LARK_ESCAPES.get(escape[0], escape[0]), quoted)


def _json(schema: Schema, layout: Mapping[str, object]) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    # Without \u escapes no declared name can be spelled as if it were another, and no half surrogate written.
    needs_escapes = _NEEDS_UNICODE_ESCAPES.search(json.dumps(schema))
    options = layout if needs_escapes else {**layout, "json_allowed_escapes": _SHORT_ESCAPES}
    return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


def _lark(grammar: str) -> str:
    return llguidance.LLMatcher.grammar_from_lark(grammar)


def _tool_schemas(spec: ToolsSpec) -> list[tuple[str, Schema]]:
    return [(tool.param, tool.schema) for tool in spec.tools]


def _mentions(keyword_value: object, value: str) -> bool:
    return value.strip().lstrip("#") in str(keyword_value)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500].rstrip(".")
