"""Validation errors in the user's terms: where, which key, what is allowed instead."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gallama.errors import InvalidConfig

_MOST_TOLD = 20

KeyPath = Sequence[str | int]
ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(model: type[ModelT], values: Mapping[str, Any], locate: Callable[[KeyPath], str]) -> ModelT:
    """The values as a `model`.

    Args:
        locate: the place of a key in the user's words, as in "model_config.yaml, line 3, `_server.port`".

    Raises:
        InvalidConfig: what is wrong, one line for each problem; `param` is the key of the first.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        told = problems[:_MOST_TOLD]
        lines = [f"{locate(problem['loc'])}: {_explain(problem, model)}" for problem in told]
        if len(problems) > len(told):
            lines.append(f"... and {len(problems) - len(told)} more")
        first_key = ".".join(map(str, problems[0]["loc"]))
        raise InvalidConfig("\n".join(lines), param=first_key or None) from None


def explain_unknown_key(key: str, valid_keys: Iterable[str]) -> str:
    """What to tell someone who wrote a key that does not exist."""
    valid = sorted(valid_keys)
    in_lower_case = {name.lower(): name for name in valid}
    guesses = difflib.get_close_matches(key.lower(), in_lower_case, n=1)
    guess = f" Did you mean `{in_lower_case[guesses[0]]}`?" if guesses else ""
    return f"unknown key `{key}`.{guess} Valid keys: {', '.join(valid)}"


def _explain(problem: ErrorDetails, model: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        *parents, key = problem["loc"]
        return explain_unknown_key(str(key), _model_at(model, parents).model_fields)
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] in ("model_type", "dict_type"):
        return "must be a mapping of keys to values"
    text = problem["msg"].replace("Input should be", "must be")
    return text if _is_secret(problem, model) else f"{text}; not {_shortened(problem['input'])}"


def _model_at(model: type[BaseModel], parents: Sequence[str | int]) -> type[BaseModel]:
    for parent in parents:
        nested = model.model_fields[str(parent)].annotation
        assert isinstance(nested, type)
        assert issubclass(nested, BaseModel)
        model = nested
    return model


def _is_secret(problem: ErrorDetails, model: type[BaseModel]) -> bool:
    field = model.model_fields.get(str(problem["loc"][0]))
    return field is not None and not field.repr


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
