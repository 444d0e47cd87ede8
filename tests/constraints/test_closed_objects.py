from typing import Any

import pytest

from gallama.constraints.closed_objects import close_objects

STRING = {"type": "string"}
OPEN = {"type": "object", "properties": {"a": STRING}}
CLOSED = {**OPEN, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (OPEN, CLOSED),
        ({"type": "array", "items": OPEN}, {"type": "array", "items": CLOSED}),
        ({"properties": {"o": OPEN}}, {"properties": {"o": CLOSED}, "additionalProperties": False}),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"allOf": [OPEN]}, {"allOf": [CLOSED]}),
        ({"$ref": "#/$defs/o", "$defs": {"o": OPEN}}, {"$ref": "#/$defs/o", "$defs": {"o": CLOSED}}),
        ({"prefixItems": [OPEN]}, {"prefixItems": [CLOSED]}),
    ],
)
def test_an_object_is_closed_where_it_alone_speaks(schema: Any, closed: Any) -> None:
    assert close_objects(schema) == closed


@pytest.mark.parametrize(
    "schema",
    [
        {**OPEN, "additionalProperties": True},
        {**OPEN, "additionalProperties": STRING},
        {**OPEN, "patternProperties": {"^x": STRING}},
        {**OPEN, "minProperties": 2},
        {**OPEN, "required": ["b"]},
        {"allOf": [OPEN, {"properties": {"b": STRING}}]},
        {**OPEN, "allOf": [{"properties": {"b": STRING}}]},
        {**OPEN, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        # {"a": ..., "b": ...} is valid under both: closing the first would hide that
        {"oneOf": [OPEN, {"type": "object", "properties": {"a": STRING, "b": STRING}, "required": ["b"]}]},
        {"allOf": [{"$ref": "#/$defs/o"}, {"properties": {"b": STRING}}], "$defs": {"o": OPEN}},
        {"$ref": "#/$defs/o", "properties": {"b": STRING}, "$defs": {"o": OPEN}},
        {**OPEN, "const": {"a": "x", "b": 1}},
        {**OPEN, "enum": [{"b": 1}]},
        {
            "allOf": [{"$ref": "#/$defs/o/properties/x"}, {"properties": {"b": STRING}}],
            "$defs": {"o": {"properties": {"x": OPEN}}},
        },
        {"allOf": [{"$ref": "#/$defs/a~1b"}, {"properties": {"b": STRING}}], "$defs": {"a/b": OPEN}},
        {"allOf": [{"$ref": "#/$defs/a%20b"}, {"properties": {"b": STRING}}], "$defs": {"a b": OPEN}},
        {"type": "object"},
        True,
    ],
)
def test_an_object_stays_open_where_closing_could_leave_nothing(schema: Any) -> None:
    assert close_objects(schema) == schema


def test_what_a_shared_definition_refers_to_stays_open_too() -> None:
    schema = {
        "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"x": {"properties": {"b": STRING}}}}],
        "$defs": {"a": {"properties": {"x": {"$ref": "#/$defs/x"}}}, "x": OPEN},
    }
    assert close_objects(schema) == schema


def test_the_schema_itself_is_left_as_it_was() -> None:
    schema = {"properties": {"o": {**OPEN}}}
    close_objects(schema)
    assert schema == {"properties": {"o": OPEN}}
