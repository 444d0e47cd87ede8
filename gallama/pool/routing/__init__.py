"""Which instance of a model answers a request: pure functions, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from gallama.pool.routing.least_busy import pick_least_busy
from gallama.pool.routing.policy import InstanceLoad, RoutingPolicy
from gallama.pool.routing.round_robin import pick_next_in_turn

__all__ = ["POLICIES", "InstanceLoad", "RoutingPolicy"]

POLICIES: Mapping[str, RoutingPolicy] = {
    "least_busy": pick_least_busy,
    "round_robin": pick_next_in_turn,
}
