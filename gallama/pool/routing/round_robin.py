"""Each instance in turn."""

from __future__ import annotations

from collections.abc import Sequence

from gallama.pool.routing.policy import InstanceLoad


def pick_next_in_turn(instances: Sequence[InstanceLoad]) -> InstanceLoad:
    return min(instances, key=lambda instance: (instance.served, instance.index))
