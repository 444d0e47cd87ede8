"""Steps whose cost does not depend on the machine that runs the tests."""

from __future__ import annotations

from gallama.engines.step_cost import StepCost


class LongStepsForNothing(StepCost):
    """What steps take on a machine where further tokens cost nothing, whatever the clock says."""

    def __init__(self) -> None:
        super().__init__()
        super().record(1, 1.0)
        super().record(1000, 1.0)

    def record(self, tokens: int, seconds: float) -> None:
        pass
