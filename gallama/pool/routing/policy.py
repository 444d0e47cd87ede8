"""What a routing policy decides on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLoad:
    """What one instance of a model has to do, and what it knows of a request's prompt.

    Only instances with room are shown to a policy.
    """

    index: int
    """Of the instance among those of its model."""
    busy: int
    """Requests that it answers now."""
    served: int
    """Requests that it was ever given."""
    capacity: int
    """Requests that it answers at the same time, at most."""
    matched_blocks: int
    """Blocks at the beginning of the prompt that it has read before; 0 where many prompts begin with them."""


RoutingPolicy = Callable[[Sequence[InstanceLoad]], InstanceLoad]
"""Picks one of the instances, at least one, for a request. Pure: the same answer for the same arguments."""
