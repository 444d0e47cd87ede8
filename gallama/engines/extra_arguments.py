"""The spec's `backend_extra_args`, as an engine knows them: what it does not know is refused."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from gallama.config import ModelSpec
from gallama.errors import InvalidConfig

Arguments = TypeVar("Arguments", bound=BaseModel)


def read_extra_arguments(kind: type[Arguments], spec: ModelSpec, *, backend: str) -> Arguments:
    """
    Args:
        kind: has a field for each argument, and forbids others.
        backend: as the user knows the engine.

    Raises:
        InvalidConfig: an unknown key, or a value that cannot be; says which keys there are.
    """
    try:
        return kind.model_validate(dict(spec.backend_extra_args))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["backend_extra_args", *map(str, first["loc"][:1])])
        valid = ", ".join(kind.model_fields)
        raise InvalidConfig(f"`{key}`: {first['msg']}. The {backend} backend takes: {valid}.") from error
