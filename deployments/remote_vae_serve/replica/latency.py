"""`LatencyEstimator`: an estimate of how long work takes on a device, learnt from what it took."""

from __future__ import annotations

WEIGHT = 0.3  # of the latest measurement: a handful of requests tell a new shape or a busier card


class LatencyEstimator:
    """Seconds for so many values of a batch, by a rate that follows what is measured. Knows nothing at first: predicts 0.

    Values (of latents, of pixels) stand for work: for one model a decode takes about as long for each of them.
    """

    def __init__(self) -> None:
        self._seconds_a_value = self._least = 0.0

    def learn(self, values: int, seconds: float) -> None:
        """Take in one measurement: a batch of so many values took so many seconds."""
        rate = seconds / max(values, 1)
        self._least = rate if self._least == 0 else min(self._least, rate)
        known = self._seconds_a_value
        self._seconds_a_value = rate if known == 0 else known + WEIGHT * (rate - known)

    def predict(self, values: int) -> float:
        """Seconds that a batch of so many values will take; 0 before the first measurement."""
        return values * self._seconds_a_value

    def least(self, values: int) -> float:
        """Seconds that such a batch will take if it is as fast as the fastest was; 0 before the first measurement."""
        return values * self._least
