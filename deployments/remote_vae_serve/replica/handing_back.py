"""`HandingBack`: whether a replica with long work before a request hands it back, so that another may take it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from remote_vae.protocol import plain as read

HandedBack = Sequence[tuple[str, float]]
"""The replicas that have handed a request back so far, in turn, each with the seconds of work that it had before it."""
FIRST_HOLD_S = 0.01
MOST_OF_ONE = 5
"""Serve's router prefers the replica with the fewest requests, and that may be the one with the longest: it is asked again, and
holds the request twice as long each time, while the others get on. After so many times there seems to be no other."""
MOST = 12
MUCH_LESS = 0.5
"""Of the work of another, this replica's own is worth going to from there; all being as busy, nothing is won by going round."""


def handed_back_of(value: Any) -> HandedBack | None:
    """What came over a handle. Raises BadRequest where it is nothing that a replica has said."""
    if value is None:
        return None
    entries = read.fields(value, len(value) if isinstance(value, (tuple, list)) else 0, "handed_back")
    pairs = [read.fields(entry, 2, "handed_back") for entry in entries]
    return [(read.text(replica, "handed_back"), _seconds(wait_s)) for replica, wait_s in pairs]


def _seconds(value: Any) -> float:
    """Infinite where the device's thread has ended, until Serve has replaced the replica."""
    return math.inf if isinstance(value, float) and value == math.inf else read.number(value, "handed_back")


class HandingBack:
    """For one replica.

    Args:
        replica: its name, by which it knows its own entries.
    """

    def __init__(self, replica: str) -> None:
        self.replica = replica

    def hold_s(self, wait_s: float, so_far: HandedBack) -> float | None:
        """Seconds for which to hold a request before it is handed back; None to keep it.

        Args:
            wait_s: work before it here.
            so_far: who has handed it back.
        """
        own = sum(replica == self.replica for replica, _ in so_far)
        others = [seconds for replica, seconds in so_far if replica != self.replica]
        if len(so_far) >= MOST or own >= MOST_OF_ONE:
            return None
        if others and wait_s * MUCH_LESS <= min(others):
            return None
        return float(FIRST_HOLD_S * 2**own)
