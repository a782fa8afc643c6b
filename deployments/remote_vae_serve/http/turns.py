"""`Turns`: the requests that are with this process's HTTP side, by model, in the order in which they came: who asks for a waiting
one is told how many come before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """For one thread, that of the event loop."""

    def __init__(self) -> None:
        self._of: defaultdict[str, dict[object, str]] = defaultdict(
            dict
        )  # request ids, by what stands for each request

    @contextmanager
    def turn(self, model: str, request_id: str) -> Iterator[None]:
        """For as long as a request is not answered."""
        turn = object()  # a client that tries again has two of one id for a moment
        self._of[model][turn] = request_id
        try:
            yield
        finally:
            del self._of[model][turn]
            if not self._of[model]:
                del self._of[model]

    def ahead(self, model: str, request_id: str, replicas: int) -> int | None:
        """How many have their turn before that request, where so many are worked on side by side; None where it is not here. What
        other doors let in, and shares among clients, are not seen from here."""
        ids = list(self._of.get(model, {}).values())
        return max(0, ids.index(request_id) + 1 - replicas) if request_id in ids else None
