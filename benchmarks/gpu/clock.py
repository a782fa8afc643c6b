"""`Clock`: how long something takes on a device, by CUDA's events or the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Milliseconds of some repetitions."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Times:
        return cls(statistics.median(milliseconds), min(milliseconds), max(milliseconds), len(milliseconds))


@dataclass(frozen=True)
class Clock:
    """Args:
    device: `cuda` or `cpu`.
    least, most: repetitions.
    seconds: after which no further repetition begins, once there were enough.
    warm_up_s: a card that was idle runs slowly at first.
    """

    device: str
    least: int = 3
    most: int = 20
    seconds: float = 2.5
    warm_up_s: float = 0.3

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def warm_up(self, function: Callable[[], object]) -> None:
        """Twice at least: the first call chooses algorithms, the second one allocates as all later ones do."""
        began = time.perf_counter()
        for number in range(self.most):
            if number >= 2 and time.perf_counter() - began > self.warm_up_s:
                return
            function()
            self.synchronize()

    def once(self, function: Callable[[], object]) -> float:
        """Milliseconds of one call, its work on the device included."""
        self.synchronize()
        if self.device != "cuda":
            began = time.perf_counter()
            function()
            return (time.perf_counter() - began) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def times(self, function: Callable[[], object]) -> Times:
        """Of repetitions, after a warm-up."""
        self.warm_up(function)
        began, found = time.perf_counter(), list[float]()
        while len(found) < self.least or (len(found) < self.most and time.perf_counter() - began < self.seconds):
            found.append(self.once(function))
        return Times.of(found)
