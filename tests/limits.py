"""Limits of time that hold on a machine that has other work as well."""

from __future__ import annotations

import time

WAIT_S = 300.0
"""For what comes at once or not at all, and for replicas of a machine that has much else to do."""
SPIN_S = 0.1


def stretched(limit_s: float) -> float:
    """The limit of a quiet machine, times how much longer than a core's time a little computing takes here and now."""
    wall, spun = time.perf_counter(), time.thread_time()
    while time.thread_time() - spun < SPIN_S:
        pass
    return limit_s * max(1.0, (time.perf_counter() - wall) / SPIN_S)
