"""The instance that has the longest part of the prompt in its cache, unless it has much more to do.

See docs/decisions/0017-prefix-affinity.md for the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from gallama.pool.routing.least_busy import pick_least_busy
from gallama.pool.routing.policy import InstanceLoad

UNEVEN_PART = 1 / 4
"""Of its capacity: with more requests than the least busy one by more than that, it is passed over."""


def pick_longest_prefix(instances: Sequence[InstanceLoad]) -> InstanceLoad:
    least_busy = pick_least_busy(instances)
    longest = max(instance.matched_blocks for instance in instances)
    holder = pick_least_busy([each for each in instances if each.matched_blocks == longest])
    return least_busy if _is_uneven(holder, least_busy) else holder


def _is_uneven(holder: InstanceLoad, least_busy: InstanceLoad) -> bool:
    return holder.busy - least_busy.busy > max(1, holder.capacity * UNEVEN_PART)
