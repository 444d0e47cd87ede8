"""What a routing policy decides on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gallama.conversation import ChatRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLoad:
    """How much one instance of a model has to do. Only instances with room are shown to a policy."""

    index: int
    """Of the instance among those of its model."""
    busy: int
    """Requests that it answers now."""
    served: int
    """Requests that it was ever given."""


RoutingPolicy = Callable[[Sequence[InstanceLoad], ChatRequest], InstanceLoad]
"""Picks one of the instances, at least one, for a request. Pure: the same answer for the same arguments."""
