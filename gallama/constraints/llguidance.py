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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from gallama.constraints.answer_grammar import answer_grammar, openings_read_otherwise
from gallama.constraints.lark import COMPACT, json_value
from gallama.constraints.ledgers import schemas_of, unenforced_keywords, without_keyword
from gallama.constraints.schema_walk import walk_schema
from gallama.constraints.specs import AnswerSpec, GrammarSpec, Schema, SchemaSpec, TextSpec, ToolsSpec
from gallama.constraints.tool_grammar import unheld_by_envelope
from gallama.constraints.validation import CHECKED_FORMATS
from gallama.conversation import KeywordPlace
from gallama.errors import (
    ConstraintFailed,
    ConstraintTooComplex,
    GallamaError,
    InvalidConstraint,
    UnsupportedConstraint,
)
from gallama.generation import StateStatus, Vocabulary

NAME = "llguidance"

# Keywords that narrow the instances and that its grammars do not hold. A keyword that is not part of JSON
# Schema at all is an annotation, as the standard says.
UNENFORCEABLE = frozenset(
    {"not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
     "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems",
     "$dynamicRef", "$recursiveRef"}
)  # fmt: skip

# An object with n optional properties has 4n items in a row of the parser; its mask then takes 20 ms.
_LIMITS = llguidance.LLParserLimits(verbose_errors=False, max_items_in_row=10_000)

# One more after each kind of keyword that was refused and left out.
_MAX_COMPILES = 8

# In front of a complaint and behind it: where in the Lark text, which the client has never seen.
_PLACE_IN_LARK = re.compile(
    r"\Aat \d+\(\d+\): (?:failed to compile JSON schema: )?|\n\s*\d+ \| .*\Z", re.DOTALL
)
_BEYOND_LIMITS = re.compile(
    r"too (complex|large|many|deep|big)|[Ll]imit|fuel|recursion|TooComplex|items; max is|symbols\.len\(\)"
)

# What a lenient grammar leaves out, in llguidance's words -> the keywords; group 1 is the value.
_LEFT_OUT: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"Unknown format: (.*?)( \(\d+ times\))?$"), ("format",)),
    (re.compile(r"oneOf not fully supported"), ("oneOf",)),
    (re.compile(r"min/maxProperties only supported"), ("minProperties", "maxProperties")),
)

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

    def compile(self, spec: AnswerSpec) -> LLGuidanceCompiled:
        """Compile a spec, up to and including its first mask, so that later steps do not fail.

        Raises:
            InvalidConstraint: no text can satisfy it, or a part of it is malformed.
            UnsupportedConstraint: llguidance cannot hold it.
            ConstraintTooComplex: it needs more than llguidance's limits.
        """
        unenforced = unenforced_keywords(spec, ledger, engine=NAME)
        if isinstance(spec.body, ToolsSpec):
            unenforced = tuple(dict.fromkeys((*unenforced, *unheld_by_envelope(spec.body))))
        self._refuse_ambiguous_grammar(spec)
        for _ in range(_MAX_COMPILES):
            try:
                return self._compile(spec, unenforced)
            except _KeywordsRefused as refused:
                # The rest still holds by construction, and the finished value is checked for these.
                for place in refused.places:
                    spec = without_keyword(spec, place)
                unenforced += refused.places
        last = unenforced[-1]
        raise UnsupportedConstraint(
            f"Too much of `{last.param}` cannot be held, the last of it `{last.pointer}`.", param=last.param
        )

    def _refuse_ambiguous_grammar(self, spec: AnswerSpec) -> None:
        """Refuse a client's grammar with a text that would be read as thoughts or as a call.

        What other constraints leave of such texts can be taken out of them; of a grammar it cannot.
        """
        text = _text_of(spec)
        if not isinstance(text, GrammarSpec):
            return
        control_tokens = self._vocabulary.control_tokens
        for opening in openings_read_otherwise(spec, control_tokens):
            matcher = self._matcher(answer_grammar(AnswerSpec(body=text), control_tokens))
            token_ids = self._vocabulary.encode(opening.encode())
            if matcher.try_consume_tokens(token_ids) == len(token_ids):
                raise InvalidConstraint(
                    f"`{text.param}` has texts that begin with {opening!r}, which in answers of this model"
                    " means something else.",
                    param=text.param,
                )

    def _compile(self, spec: AnswerSpec, unenforced: tuple[KeywordPlace, ...]) -> LLGuidanceCompiled:
        grammar = answer_grammar(spec, self._vocabulary.control_tokens)
        root = self._matcher(grammar)
        if root.is_error():
            raise self._explain(root.get_error(), spec)
        first_mask = np.zeros(self._mask_words, dtype=np.int32)
        root.unsafe_compute_mask_ptr(first_mask.ctypes.data, first_mask.nbytes)
        if root.is_error():
            raise self._explain(root.get_error(), spec)
        if not first_mask.any():
            raise InvalidConstraint(
                f"`{spec.param}` has no answer: its conditions exclude each other.", param=spec.param
            )
        if root.get_grammar_warnings():
            unenforced += self._left_out(spec)
        return LLGuidanceCompiled(root, grammar, unenforced)

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)

    def _left_out(self, spec: AnswerSpec) -> tuple[KeywordPlace, ...]:
        """What a lenient grammar says that it does not hold, beyond the ledger."""
        places = []
        for param, schema, policy in schemas_of(spec):
            if policy == "reject":
                continue
            matcher = self._matcher(_lark(f"start: {json_value(schema, {**COMPACT, 'lenient': True})}"))
            for warning in matcher.get_grammar_warnings():
                for keyword, value in _keywords_in(warning):
                    pointers = _pointers_to(keyword, value, schema)
                    if keyword == "format" and value not in CHECKED_FORMATS:
                        raise UnsupportedConstraint(
                            f"`{pointers[0]}` of `{param}` is {value!r}, a format that nothing here knows."
                            " Remove it.",
                            param=param,
                        )
                    places += [
                        KeywordPlace(param=param, pointer=pointer, keyword=keyword) for pointer in pointers
                    ]
        return tuple(places)

    def _explain(self, complaint: str, spec: AnswerSpec) -> GallamaError | _KeywordsRefused:
        complaint = _PLACE_IN_LARK.sub("", complaint.partition("\n<non-verbose/>")[0].strip())
        for pattern, keyword, error in _COMPLAINTS:
            if found := pattern.search(complaint):
                value = found.group(1) if pattern.groups and keyword else None
                param, pointers = self._locate(spec, keyword, value)
                if error is UnsupportedConstraint and pointers and _may_be_checked(spec, param):
                    return _KeywordsRefused(
                        KeywordPlace(param=param, pointer=pointer, keyword=keyword) for pointer in pointers
                    )
                where = f"`{pointers[-1]}` of `{param}`" if pointers else f"`{param}`"
                return error(f"{where} cannot be held: {_one_line(complaint)}.", param=param)
        param, _ = self._locate(spec, "", None)
        if "NoExtension" in complaint:
            return InvalidConstraint(
                f"`{param}` has no answer: its conditions exclude each other, or it refers to itself without"
                " end.",
                param=param,
            )
        # Of a grammar that the client wrote, what is left is how it is written.
        text = _text_of(spec)
        is_grammar = isinstance(text, GrammarSpec) and text.param == param
        kind = InvalidConstraint if is_grammar else UnsupportedConstraint
        return kind(f"`{param}` cannot be held: {_one_line(complaint)}.", param=param)

    def _locate(self, spec: AnswerSpec, keyword: str, value: str | None) -> tuple[str, list[str]]:
        """The request's field, and the JSON pointers inside it, that a complaint about a keyword means."""
        schemas = [(param, schema) for param, schema, _ in schemas_of(spec)]
        if not schemas:
            return spec.param, []
        text = _text_of(spec)
        if text is not None and not isinstance(text, SchemaSpec) and self._refuses_text(text):
            return text.param, []
        guilty = [item for item in schemas if len(schemas) == 1 or self._refuses(item[1])] or schemas
        param, schema = guilty[0]
        return param, self._guilty_pointers(keyword, value, schema) if keyword else []

    def _guilty_pointers(self, keyword: str, value: str | None, schema: Schema) -> list[str]:
        places = _places_of(keyword, value, schema)
        definitions = {
            name: schema[name]
            for name in ("$defs", "definitions")
            if isinstance(schema, Mapping) and name in schema
        }
        if len(places) > 1:
            refused = [
                place for place in places if self._refuses({**definitions, keyword: place[1][keyword]})
            ]
            places = refused or places[-1:]
        return [pointer for pointer, _ in places]

    def _refuses_text(self, text: TextSpec) -> bool:
        return self._matcher(answer_grammar(AnswerSpec(body=text), {})).is_error()

    def _refuses(self, schema: Schema) -> bool:
        return self._matcher(_lark(f"start: {json_value(schema, COMPACT)}")).is_error()


class _KeywordsRefused(Exception):
    """Keywords cannot be part of a grammar, but the finished value may be checked for them."""

    def __init__(self, places: Iterable[KeywordPlace]) -> None:
        super().__init__()
        self.places = tuple(places)


class LLGuidanceCompiled:
    """A grammar that any number of answers can start from."""

    backend = NAME

    def __init__(self, root: llguidance.LLMatcher, text: str, unenforced: tuple[KeywordPlace, ...]) -> None:
        self._root = root
        self.text = text
        self.unenforced = unenforced

    def start(self) -> LLGuidanceState:
        return LLGuidanceState(self._root.deep_copy())


class LLGuidanceState:
    """One sequence's place in an llguidance grammar; see `generation.State`."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher

    @property
    def status(self) -> StateStatus:
        if self.matcher.is_error():
            return "failed"
        if self.matcher.is_stopped():
            return "must_end"
        return "may_end" if self.matcher.is_accepting() else "running"

    def mask(self, out: NDArray[np.int32]) -> bool:
        self.matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        self.refuse_error()
        return True

    def accepts(self, token_ids: Sequence[int]) -> int:
        return self.matcher.validate_tokens(list(token_ids))

    def advance(self, token_ids: Sequence[int]) -> int:
        taken = self.matcher.try_consume_tokens(list(token_ids))
        self.refuse_error()
        return taken

    def forced(self) -> list[int]:
        return self.matcher.compute_ff_tokens()

    def rollback(self, count: int) -> None:
        undone = self.matcher.rollback(count)
        assert undone, f"the matcher could not undo {count} tokens: {self.matcher.get_error()}"

    def clone(self) -> LLGuidanceState:
        return LLGuidanceState(self.matcher.deep_copy())

    def refuse_error(self) -> None:
        """Raise what went wrong in a mask or an advance, if anything did."""
        if not self.matcher.is_error():
            return
        words = _one_line(self.matcher.get_error().partition("\n<non-verbose/>")[0])
        if _BEYOND_LIMITS.search(words):
            raise ConstraintTooComplex(
                f"The grammar became too complex in the middle of the answer: {words}."
            )
        raise ConstraintFailed(f"The constraint engine gave up in the middle of the answer: {words}.")


def ledger(schema: Mapping[str, Any]) -> Iterator[str]:
    """The keywords of a schema that llguidance leaves out, or would count wrongly."""
    yield from (keyword for keyword in schema if keyword in UNENFORCEABLE)
    # An answer can write the same undeclared property twice, so that two are one.
    declared = set(schema.get("required", ())) & set(schema.get("properties", ()))
    if schema.get("minProperties", 0) > len(declared) + 1:
        yield "minProperties"


def _keywords_in(warning: str) -> list[tuple[str, str | None]]:
    """The keywords that a warning is about, each with its value if the warning tells it."""
    for pattern, keywords in _LEFT_OUT:
        if found := pattern.search(warning):
            return [(keyword, found.group(1) if pattern.groups else None) for keyword in keywords]
    names = re.search(r"Unimplemented keys: (\[.*\])", warning)
    if names is None:
        raise UnsupportedConstraint(f"A part of the schema cannot be held: {_one_line(warning)}.")
    # What is on the ledger has been named already.
    return [(name, None) for name in json.loads(names.group(1)) if name not in UNENFORCEABLE]


def _pointers_to(keyword: str, value: str | None, schema: Schema) -> list[str]:
    return [pointer for pointer, _ in _places_of(keyword, value, schema)]


def _places_of(keyword: str, value: str | None, schema: Schema) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (f"{pointer}/{keyword}", subschema)
        for pointer, subschema in walk_schema(schema)
        if keyword in subschema and (value is None or _mentions(subschema[keyword], value))
    ]


def _text_of(spec: AnswerSpec) -> TextSpec | None:
    """What an answer in text must be."""
    return spec.body.text if isinstance(spec.body, ToolsSpec) else spec.body


def _may_be_checked(spec: AnswerSpec, param: str) -> bool:
    return any(policy != "reject" for name, _, policy in schemas_of(spec) if name == param)


def _lark(grammar: str) -> str:
    return llguidance.LLMatcher.grammar_from_lark(grammar)


def _mentions(keyword_value: object, value: str) -> bool:
    return value.strip().lstrip("#") in str(keyword_value)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500].rstrip(".")
