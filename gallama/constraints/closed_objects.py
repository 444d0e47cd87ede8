"""Objects that declare their properties get no others.

JSON Schema allows undeclared properties unless told otherwise, and a small model makes use of it: it
invents arguments that no function takes. Closing an object only leaves out answers, so what remains is
as valid as before. It is done only where it cannot leave out all of them: not where several subschemas
speak of one object, each of some of its properties.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_OPENERS = ("additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties", "enum",
            "const")  # fmt: skip
_IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref", "not", "if", "then", "else", "dependentSchemas")
_CHILDREN = ("items", "additionalProperties", "additionalItems", "contains")
_CHILD_LISTS = ("prefixItems", "items")
_LISTS = (*_CHILD_LISTS, "anyOf", "oneOf", "allOf")
_DEFINITIONS = ("$defs", "definitions")
_MAPS = ("properties", "patternProperties", *_DEFINITIONS)
# Of the plain ones: no parts of a definition, and no names with escapes.
_DEFINITION_POINTER = re.compile(r"#(/(\$defs|definitions)/[^/~%]+)+")
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
     "$schema", "$id", *_DEFINITIONS}
)  # fmt: skip


def close_objects(schema: Any) -> Any:
    """A copy of the schema whose objects, where it is safe, have only the properties that they declare."""
    shared = _shared_definitions(schema)
    if any(not _DEFINITION_POINTER.fullmatch(pointer) for pointer in shared):
        return schema  # parts of the schema itself are looked at twice: too entangled to be sure
    return _closed(schema, alone=True, shared=shared, pointer="#")


def _shared_definitions(schema: Any) -> frozenset[str]:
    """Pointers of the definitions that are used where other subschemas speak of the same value."""
    shared: frozenset[str] = frozenset()
    while True:
        found = shared | frozenset(_shared_references(schema, alone=True, shared=shared, pointer="#"))
        if found == shared:
            return shared
        shared = found


def _closed(schema: Any, *, alone: bool, shared: frozenset[str], pointer: str) -> Any:
    """
    Args:
        alone: whether no other subschema speaks of the same value.
        shared: pointers of definitions that are referred to where others speak of the same value.
    """
    if not isinstance(schema, Mapping):
        return schema
    closed = {
        keyword: _closed_value(schema, keyword, value, alone=alone, shared=shared, pointer=pointer)
        for keyword, value in schema.items()
    }
    if _is_only_view(schema, alone) and _declares_all(schema):
        closed["additionalProperties"] = False
    return closed


def _declares_all(schema: Mapping[str, Any]) -> bool:
    """Whether an object's properties are listed, and nothing in the schema needs others."""
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(properties, Mapping)
        and isinstance(required, list)
        and all(name in properties for name in required)
        and not any(keyword in schema for keyword in _OPENERS)
    )


def _closed_value(
    schema: Mapping[str, Any], keyword: str, value: Any, *, alone: bool, shared: frozenset[str], pointer: str
) -> Any:
    closed = [
        _closed(item, alone=alone_there, shared=shared, pointer=below)
        for below, item, alone_there in _subschemas(schema, keyword, value, alone, shared, pointer)
    ]
    if not closed:
        return value
    if keyword in _MAPS:
        return dict(zip(value, closed, strict=True))
    return closed if isinstance(value, list) else closed[0]


def _subschemas(
    schema: Mapping[str, Any], keyword: str, value: Any, alone: bool, shared: frozenset[str], pointer: str
) -> Iterator[tuple[str, Any, bool]]:
    """The schemas that stand under one keyword: pointer, schema, and whether each speaks alone."""
    here = f"{pointer}/{keyword}"
    if keyword in _DEFINITIONS and isinstance(value, Mapping):
        for name, item in value.items():
            yield f"{here}/{name}", item, f"{here}/{name}" not in shared
    elif keyword in _MAPS and isinstance(value, Mapping):
        for name, item in value.items():
            yield f"{here}/{name}", item, _is_only_view(schema, alone)
    elif keyword in _LISTS and isinstance(value, list):
        for index, item in enumerate(value):
            yield f"{here}/{index}", item, _alone_in_list(schema, keyword, value, alone)
    elif keyword in _CHILDREN and isinstance(value, Mapping):
        yield here, value, _is_only_view(schema, alone)


def _is_only_view(schema: Mapping[str, Any], alone: bool) -> bool:
    """Whether what a schema says of an object's or array's parts is all that is said of them."""
    return alone and not any(keyword in schema for keyword in _IN_PLACE)


def _alone_in_list(schema: Mapping[str, Any], keyword: str, value: list[Any], alone: bool) -> bool:
    if keyword in _CHILD_LISTS:
        return _is_only_view(schema, alone)
    says_more = any(other not in _ANNOTATIONS and other not in (keyword, "type") for other in schema)
    # Of oneOf's branches all speak of the value: it must break every one but one, as they were written.
    return alone and not says_more and (keyword == "anyOf" or (keyword == "allOf" and len(value) == 1))


def _shared_references(schema: Any, *, alone: bool, shared: frozenset[str], pointer: str) -> Iterator[str]:
    """Pointers that are referred to from places where other subschemas speak of the same value."""
    if not isinstance(schema, Mapping):
        return
    reference = schema.get("$ref")
    says_more = any(other not in _ANNOTATIONS and other != "$ref" for other in schema)
    if isinstance(reference, str) and (not alone or says_more):
        yield reference
    for keyword, value in schema.items():
        for below, item, alone_there in _subschemas(schema, keyword, value, alone, shared, pointer):
            yield from _shared_references(item, alone=alone_there, shared=shared, pointer=below)
