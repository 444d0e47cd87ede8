"""What must hold, in a form that no constraint engine owns: the input of every `Backend.compile`.

Built only by `admission`, so whoever holds a spec knows that it is sound and not too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from gallama.constraints.envelope import ToolEnvelope
from gallama.conversation import ConstraintKind

Schema = Mapping[str, Any] | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaSpec:
    """The answer is compact JSON that the schema accepts."""

    kind: ConstraintKind
    schema: Schema
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegexSpec:
    """The answer, or its beginning, matches the pattern."""

    kind: ConstraintKind
    pattern: str
    """Normalized: no anchors at its ends, Rust's syntax."""
    prefix_only: bool
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceSpec:
    """The answer, or its beginning, is one of the strings."""

    kind: ConstraintKind
    options: tuple[str, ...]
    prefix_only: bool
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableTool:
    """A tool that the answer may call, and the schema of its arguments."""

    name: str
    schema: Schema
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolsSpec:
    """The answer is calls of these tools in the family's envelope, or, where allowed, text."""

    kind: ConstraintKind
    tools: tuple[CallableTool, ...]
    envelope: ToolEnvelope
    text_allowed: bool
    """Whether the model may answer in text instead, or say something before its calls."""
    many_calls: bool


ConstraintSpec = SchemaSpec | RegexSpec | ChoiceSpec | ToolsSpec


def cache_key(spec: ConstraintSpec) -> bytes:
    """Equal for specs that compile to the same grammar. The order of properties counts."""
    return type(spec).__name__.encode() + msgspec.json.encode(spec)
