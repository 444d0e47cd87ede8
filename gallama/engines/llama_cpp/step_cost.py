"""What a batch costs, learned from the steps so far."""

from __future__ import annotations

# What a step says is worth after the next one: a text grows, and other work on the machine comes and goes.
_DECAY = 0.95
# Long pieces of prompts are computed another way, cheaper for each token.
_MOST_TOKENS = 256


class StepCost:
    """A step takes `seconds_per_step + tokens * seconds_per_token`.

    That is the line of least squares through the last steps.
    """

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.seconds_per_token = 0.0
        self._weight = self._tokens = self._tokens_squared = self._seconds = self._tokens_seconds = 0.0

    @property
    def is_known(self) -> bool:
        return self._weight > 0

    def record(self, tokens: int, seconds: float) -> None:
        """Learn from a step; the longest ones say nothing about others."""
        if tokens > _MOST_TOKENS:
            return
        self._weight = self._weight * _DECAY + 1
        self._tokens = self._tokens * _DECAY + tokens
        self._tokens_squared = self._tokens_squared * _DECAY + tokens * tokens
        self._seconds = self._seconds * _DECAY + seconds
        self._tokens_seconds = self._tokens_seconds * _DECAY + tokens * seconds
        self._fit()

    def tokens_within(self, seconds: float) -> int:
        """How many tokens a step of that length may have; 0 while nothing is known, or where none fits."""
        if not self.is_known:
            return 0
        return max(0, int((seconds - self.seconds_per_step) / self.seconds_per_token))

    def _fit(self) -> None:
        mean_tokens, mean_seconds = self._tokens / self._weight, self._seconds / self._weight
        variance = self._tokens_squared / self._weight - mean_tokens**2
        covariance = self._tokens_seconds / self._weight - mean_tokens * mean_seconds
        if variance > 0.25:
            slope = covariance / variance
        else:  # steps of one length only: what a token adds is as it was, or half of the step
            slope = self.seconds_per_token or mean_seconds / mean_tokens / 2
        # Neither a step nor a token is for nothing, whatever the noise says.
        most = mean_seconds / mean_tokens
        self.seconds_per_token = min(max(slope, most / 20), most)
        self.seconds_per_step = mean_seconds - self.seconds_per_token * mean_tokens
