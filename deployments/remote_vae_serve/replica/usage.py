"""`Usage`: whether a replica has decoded or encoded since it was last asked. By that an idle model is known (`scaling`).

Serve counts whatever runs in a replica at the moment that it looks. So a GET at the model's own path, or a question of the
ingress, would keep a model awake, and short decodes between two looks would not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Usage:
    """Of one replica. For one thread."""

    def __init__(self) -> None:
        self._running = 0
        self._begun = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """While a request is being answered, its body being read included."""
        self._begun = True
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def since_last(self) -> float:
        """1 if anything runs, or has begun since the last call; else 0."""
        used = self._begun or self._running > 0
        self._begun = False
        return float(used)
