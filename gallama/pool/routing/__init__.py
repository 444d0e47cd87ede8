"""Which instance of a model answers a request: pure functions, one file each, over what the pool knows."""

from __future__ import annotations

from collections.abc import Mapping

from gallama.config.server_config import RoutingPolicyName
from gallama.pool.routing.least_busy import pick_least_busy
from gallama.pool.routing.policy import InstanceLoad, RoutingPolicy
from gallama.pool.routing.prefix_affinity import pick_longest_prefix
from gallama.pool.routing.prefixes import PrefixIndex, estimated_tokens, prefix_blocks
from gallama.pool.routing.round_robin import pick_next_in_turn

__all__ = [
    "POLICIES",
    "InstanceLoad",
    "PrefixIndex",
    "RoutingPolicy",
    "estimated_tokens",
    "prefix_blocks",
]

POLICIES: Mapping[RoutingPolicyName, RoutingPolicy] = {
    "prefix_affinity": pick_longest_prefix,
    "least_busy": pick_least_busy,
    "round_robin": pick_next_in_turn,
}
