"""`Admission`: whether one more request is let in, by fair shares among clients, and if not, when to come again (`Retry-After`).

A client may hold as many places of a queue as are free: alone half of them, beside another a third. So that there always is a
place for who has none, however many requests the others send at once. In the ingress it is asked before a body is read, and in
the replica, at whose queue all doors meet.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from remote_vae.errors import Overloaded

REMEMBERED = 64
"""Answers by which the rate of a model is known."""
LONGEST_S = 60.0
UNKNOWN_S = 1.0


class Admission:
    """The requests of one model that were let in and are not answered yet, by client. For one thread.

    Args:
        name: of the model, for the words of the error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._held: Counter[str] = Counter()
        self._answered: deque[float] = deque(maxlen=REMEMBERED)

    def check(self, client: str, places: int | None, start_s: float | None = None) -> None:
        """Raises Overloaded where the client holds as many places as are free.

        Args:
            client: who asks; see `http.client_identity`.
            places: requests that are let in at a time; None for no limit.
            start_s: seconds that a replica takes to start, where none runs.
        """
        if places is not None and self._held[client] >= places - self._held.total():
            raise self.full(start_s)

    def check_turn(self, wait_s: float, deadline_s: float | None) -> None:
        """Raises Overloaded where a request would have its turn later than its client waits for it."""
        if deadline_s is not None and wait_s > deadline_s:
            raise Overloaded(
                f"The queue of {self._name} is {wait_s:.1f} s long, and the client waits {deadline_s:.1f} s; try again",
                retry_after=min(LONGEST_S, max(UNKNOWN_S, wait_s - deadline_s)),
            )

    def full(self, start_s: float | None = None) -> Overloaded:
        """The 503 of a full queue; it says when there will be room."""
        if start_s is None:
            return Overloaded(f"The queue of {self._name} is full; try again", retry_after=self.wait_s())
        return Overloaded(f"{self._name} is starting, and its queue is full; try again", retry_after=max(1.0, start_s))

    def wait_s(self) -> float:
        """Seconds until those before a request that came now will have been answered, at the rate of the last answers."""
        now = time.monotonic()
        if len(self._answered) < 2:
            return UNKNOWN_S
        rate = len(self._answered) / max(now - self._answered[0], 0.001)
        return min(LONGEST_S, max(UNKNOWN_S, math.ceil(self._held.total() / rate)))

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """For as long as a request of that client is not answered."""
        self._held[client] += 1
        try:
            yield
            self._answered.append(time.monotonic())
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]
