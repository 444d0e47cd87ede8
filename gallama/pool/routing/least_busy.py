"""The instance with the fewest requests; among equals the one that was given the fewest so far."""

from __future__ import annotations

from collections.abc import Sequence

from gallama.pool.routing.policy import InstanceLoad


def pick_least_busy(instances: Sequence[InstanceLoad]) -> InstanceLoad:
    return min(instances, key=lambda instance: (instance.busy, instance.served, instance.index))
