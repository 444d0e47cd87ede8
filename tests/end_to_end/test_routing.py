"""What routing is for, on the real model: that conversations are read once."""

from __future__ import annotations

import pytest

from benchmarks.routing import MOST_COMPUTED, compare


@pytest.mark.slow
def test_conversations_that_go_back_to_their_instance_have_half_as_much_computed() -> None:
    row = compare(5, at_once=1)  # one after the other, so that each run is the same
    assert row["ratio"] <= MOST_COMPUTED, row
