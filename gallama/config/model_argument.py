"""The grammar of `-id`: "model_id=mistral cache_size=8192 backend_extra_args.n_batch=512".

Pairs `key=value` stand between blanks. Quotes, single or double, keep blanks together, in a value or
around a whole pair. A backslash is a character like any other, so that Windows paths survive.
A dot in a key makes a nested setting.
"""

from __future__ import annotations

import re
from typing import Any

from gallama.config.model_spec import NESTED_KEYS, ModelSpec
from gallama.config.problems import explain_unknown_key
from gallama.errors import InvalidConfig

_PAIR = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
_QUOTED = re.compile(r""""([^"]*)"|'([^']*)'""")
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d{1,3})?")


def parse_model_argument(text: str) -> dict[str, Any]:
    """The values that one `-id` gives, for `ModelSpec` to judge.

    Values are text, but those of nested settings are numbers or booleans where they look like it
    and are not quoted: an engine's arguments have no declared types.

    Raises:
        InvalidConfig: an open quote, a pair without `=`, an unknown or repeated key, no `model_id`.
    """
    values: dict[str, Any] = {}
    for pair in _split_pairs(text):
        key, value = _read_pair(pair, text)
        _put(values, key, value, text)
    if "model_id" not in values:
        raise _problem(text, "`model_id` is missing; write model_id=NAME, a file or a folder")
    return values


def _problem(text: str, explanation: str) -> InvalidConfig:
    return InvalidConfig(f"-id {text!r}: {explanation}")


def _split_pairs(text: str) -> list[str]:
    pairs = _PAIR.findall(text)
    left_over = _PAIR.sub("", text).strip()
    if left_over:
        raise _problem(
            text, f"the quote {left_over[0]} is not closed; put the other kind around it to mean itself"
        )
    return pairs


def _read_pair(pair: str, text: str) -> tuple[str, object]:
    key, equals, value = _QUOTED.sub(lambda quoted: quoted[1] or quoted[2] or "", pair).partition("=")
    if not equals:
        raise _problem(text, f"{pair!r} has no `=`; write key=value, as in model_id={key}")
    if not value and not pair.endswith(("'", '"')):
        raise _problem(text, f"`{key}` has no value")
    is_quoted = _QUOTED.search(pair) is not None
    return key, value if is_quoted or "." not in key else _typed(value)


def _typed(value: str) -> object:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if _INTEGER.fullmatch(value):
        return int(value)
    return float(value) if _DECIMAL.fullmatch(value) else value


def _put(values: dict[str, Any], dotted_key: str, value: object, text: str) -> None:
    top, *nested = dotted_key.split(".")
    if top not in ModelSpec.model_fields:
        raise _problem(text, explain_unknown_key(top, ModelSpec.model_fields))
    if (top in NESTED_KEYS) != bool(nested) or "" in nested:
        raise _problem(text, _explain_nesting(top, dotted_key))
    place = values
    for part in dotted_key.split(".")[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise _problem(text, f"`{dotted_key}` goes into a setting that has a value already")
    if dotted_key.split(".")[-1] in place:
        raise _problem(text, f"`{dotted_key}` is given twice")
    place[dotted_key.split(".")[-1]] = value


def _explain_nesting(top: str, dotted_key: str) -> str:
    if top in NESTED_KEYS:
        return f"`{dotted_key}` needs the name of a setting; write {top}.NAME=VALUE"
    return f"`{dotted_key}` has a dot, but `{top}` holds one value"
