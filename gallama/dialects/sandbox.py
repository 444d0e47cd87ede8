"""Runs a model's Jinja template, which nobody here has read: no reach outside, bounded time and memory.

A template comes with a model file, so it is as trustworthy as a download. Jinja's sandbox keeps it from
Python's insides; what it does not do is bound the work. Here every block, call, filter and operator that
makes a new value reports to a `Budget`, which ends the rendering. This needs no thread and no signal, and
works because between two reports no single step can take long: what could make a value grow by more than
its operands is measured before it is done, or left out.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, TypeVar

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Namespace

Value = TypeVar("Value")

_LARGEST_VALUE = 8 << 20
"""Characters of a text, or bytes of a list with all that is in it."""
_LARGEST_INTEGER_BITS = 4096
_LARGEST_INDENT = 16
_WEIGHT_OF_A_STEP = 64
_BYTES_PER_ITEM = 8

# Left out: what pads or formats to a width (center, format, wordwrap, ...), what nests sums (sum, batch,
# slice), what prints insides (pprint, xmlattr). `join`, `replace`, `indent` and `tojson` are our own.
# fmt: off
_KEPT_FILTERS = [
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse",
    "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
]
_TEXT_METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isspace", "istitle", "isupper", "join",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title",
    "upper",
})
# fmt: on
_MAPPING_METHODS = frozenset({"get", "items", "keys", "values"})


class TemplateRefusal(Exception):
    """The template called `raise_exception`; the words are its own."""


class LimitExceeded(Exception):
    """The template took more time or memory than a rendering may."""


class Budget:
    """What one rendering may still use: time, and characters or bytes of values made on the way."""

    def __init__(self, *, seconds: float, weight: int) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._weight_left = weight

    def spend(self, weight: int = 0) -> None:
        self._weight_left -= weight + _WEIGHT_OF_A_STEP
        if self._weight_left < 0:
            raise LimitExceeded("it does more work than a chat template may")
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"it takes more than {self._seconds:g} seconds")


def _refuse_larger(weight: int) -> None:
    if weight > _LARGEST_VALUE:
        raise LimitExceeded(f"it makes a value of more than {_LARGEST_VALUE >> 20} MiB")


def _weigh(value: Any) -> int:
    """Characters or bytes of a value and all that is in it.

    What is in a value twice counts twice, so that no list of lists of the same list can be made that
    would only become large when it is printed or compared.
    """
    weight = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str | bytes):
            weight += len(item)
        elif isinstance(item, int):
            weight += item.bit_length() // 8
        elif isinstance(item, Collection) and not isinstance(item, range | Undefined):
            weight += len(item) * _BYTES_PER_ITEM
            _refuse_larger(weight)
            waiting.extend(item)
            if isinstance(item, Mapping):
                waiting.extend(item.values())
    _refuse_larger(weight)
    return weight


class _Namespace(Namespace):
    """Jinja's `namespace`, which would print all that is in it, and in what is in it."""

    def __repr__(self) -> str:
        return "<namespace>"


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's words for training. Here it does nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _ReportingCode(CodeGenerator):
    """Compiles a template so that blocks and new values report to `SandboxedTemplates`."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        # A filtered loop whose test is never true does not reach its block.
        if node.test is not None:
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            node.test = nodes.And(step, node.test)
        super().visit_For(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._report(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._report(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._report(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self._report(super().visit_Compare, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._report(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_texts((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")

    def _report(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.report(")
        visit(node, frame)
        self.write(")")


class SandboxedTemplates(ImmutableSandboxedEnvironment):
    """Compiles templates as Hugging Face's libraries do, and renders them within limits.

    Not to be used by two threads at once: the budget is that of the one rendering.
    """

    code_generator_class = _ReportingCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, seconds: float, weight: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
            finalize=self._to_text,
            optimized=False,  # what is computed while compiling would be outside of any budget
        )
        self._seconds = seconds
        self._weight = weight
        self.start_rendering()
        self.filters = {name: self._reporting(self.filters[name]) for name in _KEPT_FILTERS}
        self.filters |= {
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "tojson": self._to_json,
        }
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def start_rendering(self) -> None:
        """Begin with a full budget."""
        self._budget = Budget(seconds=self._seconds, weight=self._weight)

    def step(self) -> bool:
        """Report one step of work. Always True, to stand in a condition."""
        self._budget.spend()
        return True

    def report(self, value: Value) -> Value:
        """Report a new value, and give it back."""
        self._budget.spend(_weigh(value))
        return value

    def concat(self, values: Iterable[Any]) -> str:  # of macros and of `{% set %}` blocks
        return self.join_texts(values)

    def join_texts(self, values: Iterable[Any]) -> str:
        texts = []
        length = 0
        for value in values:
            texts.append(self._to_text(value))
            length += len(texts[-1])
            _refuse_larger(length)
        return "".join(texts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        if isinstance(obj, Mapping):
            return attr in _MAPPING_METHODS
        return isinstance(obj, Namespace | LoopContext | Cycler) and not attr.startswith("_")

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja's own would print as nothing where the template goes no further.
        raise SecurityError(f"it may not use {attribute!r} of a value of type {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        # `format` is no method that a template may have; see `_TEXT_METHODS`.
        return None

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.step()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, Mapping):
            return super().call(context, function, *args, **kwargs)  # nothing new is made
        if isinstance(owner, str) and function.__name__ == "join":
            return self._join(args[0], owner)
        if isinstance(owner, str) and function.__name__ == "replace":
            # Jinja adds arguments of its own inside of loops and blocks.
            named = {name: value for name, value in kwargs.items() if not name.startswith("_")}
            return self._replace(owner, *args, **named)
        return self.report(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator != "+":
            _refuse_growth(operator, left, right)
        return self.report(super().call_binop(context, operator, left, right))

    def _reporting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def reporting(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return self.report(function(*args, **kwargs))

        return reporting

    def _to_text(self, value: Any) -> str:
        return self.report(str(value))

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        width_characters = width if isinstance(width, int) else len(width)
        _refuse_larger(len(text) + (text.count("\n") + 1) * width_characters)
        return self.report(do_indent(text, width, first, blank))

    def _join(self, values: Iterable[Any], separator: str = "") -> str:
        texts = [self._to_text(value) for value in values]
        _refuse_larger(sum(map(len, texts)) + len(texts) * len(separator))
        return self.report(separator.join(texts))

    def _replace(self, value: Any, old: str, new: str, count: int | None = None) -> str:
        text = self._to_text(value)
        _refuse_larger(len(text) + text.count(old) * len(new))
        return self.report(text.replace(old, new, -1 if count is None else count))

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As `json.dumps`, with the parameters and defaults of Hugging Face's filter."""
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if indent is None:
            return self.report(encoder.encode(value))
        if (indent if isinstance(indent, int) else len(indent)) > _LARGEST_INDENT:
            raise LimitExceeded(f"it indents JSON by more than {_LARGEST_INDENT}")
        # Piece by piece: indenting makes what is deeply nested much larger than it was.
        return self.join_texts(encoder.iterencode(value))


def _refuse_growth(operator: str, left: Any, right: Any) -> None:
    """Refuse, before it is done, an operation whose result could be much larger than its operands."""
    if isinstance(left, int) and isinstance(right, int):
        bits = {
            "*": left.bit_length() + right.bit_length(),
            "**": left.bit_length() * max(right, 0),
        }.get(operator, 0)
        if bits > _LARGEST_INTEGER_BITS:
            raise LimitExceeded(f"it makes a number of more than {_LARGEST_INTEGER_BITS} bits")
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, Collection) and isinstance(times, int):
                _refuse_larger(_weigh(value) * times)
    elif operator == "%" and isinstance(left, str | bytes):
        raise SecurityError("it may not format text with %")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _strftime_now(form: str) -> str:
    if re.search(r"%[^A-Za-z%]*\d", form):
        raise SecurityError("it may not give strftime_now a width")
    return datetime.now().strftime(form)
