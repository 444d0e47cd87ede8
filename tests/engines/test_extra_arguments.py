"""What a spec gives an engine beside the keys that all have, and what it says of others."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import BaseModel, Field, model_validator

from gallama.config import ModelSpec
from gallama.engines.extra_arguments import read_extra_arguments
from gallama.errors import InvalidConfig


class Arguments(BaseModel, extra="forbid", frozen=True):
    threads: Annotated[int, Field(ge=1)] = 1
    sizes: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check_together(self) -> Arguments:
        if len(self.sizes) > self.threads:
            raise ValueError("each size needs a thread")
        return self


def read(**given: object) -> Arguments:
    spec = ModelSpec.model_validate(
        {"model_id": "any", "backend": "scripted", "backend_extra_args": {**given}}
    )
    return read_extra_arguments(Arguments, spec, backend="some")


def test_arguments_are_read_and_the_others_have_their_defaults() -> None:
    assert read(threads="4") == Arguments(threads=4, sizes=())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"thread": 4}, "`backend_extra_args.thread`: Extra inputs are not permitted."),
        ({"threads": 0}, "`backend_extra_args.threads`: Input should be greater than or equal to 1."),
        ({"sizes": [1, "x"]}, "`backend_extra_args.sizes`: Input should be a valid integer"),
        ({"sizes": [1, 2]}, "`backend_extra_args`: Value error, each size needs a thread."),
    ],
)
def test_what_an_engine_does_not_know_is_refused_with_what_it_knows(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        read(**given)
    assert refusal.value.message.startswith(message)
    assert refusal.value.message.endswith(" The some backend takes: threads, sizes.")
