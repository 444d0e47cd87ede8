from __future__ import annotations

import pytest

from gallama.conversation import ChatRequest
from gallama.pool.routing import POLICIES, InstanceLoad

REQUEST = ChatRequest(request_id="r", model="m", messages=())


def load(index: int, busy: int, served: int) -> InstanceLoad:
    return InstanceLoad(index=index, busy=busy, served=served)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_only_instance_is_picked(policy: str) -> None:
    only = load(3, busy=9, served=9)
    assert POLICIES[policy]([only], REQUEST) is only


@pytest.mark.parametrize("policy", POLICIES)
def test_idle_instances_are_used_evenly(policy: str) -> None:
    served = [0, 0, 0]
    for _ in range(30):
        loads = [load(i, busy=0, served=count) for i, count in enumerate(served)]
        served[POLICIES[policy](loads, REQUEST).index] += 1
    assert served == [10, 10, 10]


def test_least_busy_prefers_the_instance_with_fewer_requests() -> None:
    loads = [load(0, busy=2, served=2), load(1, busy=1, served=50)]
    assert POLICIES["least_busy"](loads, REQUEST).index == 1


def test_round_robin_prefers_the_instance_that_was_given_fewer() -> None:
    loads = [load(0, busy=2, served=2), load(1, busy=1, served=50)]
    assert POLICIES["round_robin"](loads, REQUEST).index == 0
