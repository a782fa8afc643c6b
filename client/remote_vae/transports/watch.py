"""`Watch`: the wait for a call's requests, told to a callback several times a second, which can end it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from remote_vae.protocol.model_description import ModelDescription
from remote_vae.transports.in_flight import InFlight
from remote_vae.transports.waiting import OnWait

T = TypeVar("T")
Peek = Callable[[str], ModelDescription | None]
"""What the server says of the model to whoever has a request of that id with it; wakes nothing, takes no longer than `POLL_S`."""
TICK_S = 0.25
POLL_S = 1.0
"""Between two looks at the server; what is answered sooner is not looked at."""


class Watch:
    """A call that is waited for.

    Args:
        on_wait: told, in the thread or on the event loop that waits.
        peek: asked in a thread of its own; None where there is no asking.
        flights: the call's requests.
    """

    def __init__(self, on_wait: OnWait, peek: Peek | None, flights: Sequence[InFlight]) -> None:
        self._on_wait = on_wait
        self._peek = peek
        self._left = list(flights)
        self._description: ModelDescription | None = None
        self._is_over = threading.Event()
        self._poll: threading.Thread | None = None
        self._asking = InFlight("describe")

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._asking.break_off()
        if error is not None:
            for flight in self._left:
                flight.break_off()
        if self._poll is not None:
            self._poll.join(POLL_S)  # or it would open a connection that nobody closes any more

    def has_landed(self, flight: InFlight) -> None:
        """It is waited for no more."""
        self._left.remove(flight)

    def tell(self) -> None:
        """Tell what the first of those that are left waits for. Raises what the callback does."""
        first = self._left[0]
        if self._peek is not None and self._poll is None and first.seconds >= POLL_S:
            look = partial(self._asking.carry, partial(self._look, self._peek))
            self._poll = threading.Thread(target=look, name="remote-vae-wait", daemon=True)
            self._poll.start()
        self._on_wait(first.waiting(self._description))

    def _look(self, peek: Peek) -> None:
        while not self._is_over.is_set():
            for first in self._left[:1]:
                self._description = peek(first.id)
            self._is_over.wait(POLL_S)


def watched(on_wait: OnWait, peek: Peek | None, verb: str, runs: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """What each returns, in order; so many run at a time. Where one fails or the callback raises, the others are broken off, and
    nobody waits for them."""
    flights = [InFlight(verb, is_told=True) for _ in runs]
    pool = ThreadPoolExecutor(min(at_once, len(runs)), thread_name_prefix="remote-vae-call")
    try:
        with Watch(on_wait, peek, flights) as watch:
            carried = {pool.submit(flight.carry, run): flight for flight, run in zip(flights, runs, strict=True)}
            left: set[Future[T]] = set(carried)
            while left:
                done, left = wait(left, TICK_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                    watch.has_landed(carried[future])
                if left:
                    watch.tell()
            return [future.result() for future in carried]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


async def watched_async(
    on_wait: OnWait | None, peek: Peek | None, verb: str, runs: Sequence[Callable[[], Coroutine[Any, Any, T]]]
) -> list[T]:
    """The same of what is awaited, all at a time; without a callback too."""
    flights = [InFlight(verb, is_told=on_wait is not None) for _ in runs]
    carried = {
        flight.carry(lambda run=run: asyncio.ensure_future(run())): flight  # type: ignore[misc]
        for flight, run in zip(flights, runs, strict=True)
    }
    left: set[asyncio.Task[T]] = set(carried)
    try:
        with Watch(on_wait or _untold, peek if on_wait else None, flights) as watch:
            while left:
                done, left = await asyncio.wait(left, timeout=on_wait and TICK_S, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                    watch.has_landed(carried[task])
                if left:
                    watch.tell()
        return [task.result() for task in carried]
    finally:
        for task in left:
            task.cancel()


def _untold(waiting: object) -> None:
    """Nobody asked to be told."""
