"""Each instance in turn."""

from __future__ import annotations

from collections.abc import Sequence

from gallama.conversation import ChatRequest
from gallama.pool.routing.policy import InstanceLoad


def pick_next_in_turn(instances: Sequence[InstanceLoad], _request: ChatRequest) -> InstanceLoad:
    return min(instances, key=lambda instance: (instance.served, instance.index))
