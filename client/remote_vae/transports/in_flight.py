"""`InFlight`: one request on its way, as the thread that waits for it sees it: how far it is, and how to break it off.

The thread that carries it finds it with `current`, so that nothing between has to hand it on.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import replace
from typing import TypeVar

from remote_vae.errors import Cancelled, RemoteVAEError
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.transports.waiting import Waiting

T = TypeVar("T")
_current: ContextVar[InFlight | None] = ContextVar("in_flight", default=None)


def current() -> InFlight | None:
    """The request that this thread, or this task, carries; None where nobody watches it."""
    return _current.get()


class InFlight:
    """A request that somebody watches.

    Args:
        verb: `decode`, `encode` or `describe`.
        is_told: whether anybody is told of it, by what the server says.

    Attributes:
        id: by which the server knows it, in `x-request-id`; "" where nobody asks it.
    """

    def __init__(self, verb: str, is_told: bool = False) -> None:
        self.id = uuid.uuid4().hex if is_told else ""
        self._verb = verb
        self._began = time.monotonic()
        self._told: Waiting | None = None  # what is known here, without the server
        self._is_broken = threading.Event()
        self._break: Callable[[], object] | None = None
        self._lock = threading.Lock()

    def carry(self, run: Callable[[], T]) -> T:
        """Run it as that which carries this request."""
        context = copy_context()
        context.run(_current.set, self)
        return context.run(run)

    def waiting(self, description: ModelDescription | None) -> Waiting:
        """What it waits for, by what the server says of the model."""
        if (told := self._told) is not None:
            return replace(told, seconds=self.seconds)
        return Waiting.at_server(self._verb, self.seconds, description)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def is_sent(self) -> None:
        """From now on the server knows more of it."""
        self._told = None

    def receives(self, received: int, total: int | None) -> None:
        self._told = Waiting("receiving", self.seconds, received=received, total=total)

    def retries(self, pause_s: float, error: RemoteVAEError) -> None:
        """It failed, and is tried again after a pause."""
        self._told = Waiting("retrying", self.seconds, error.message, pause_s)

    def pause(self, pause_s: float, error: RemoteVAEError) -> None:
        """The pause before the next try. Raises Cancelled."""
        self.retries(pause_s, error)
        if self._is_broken.wait(pause_s):
            raise _cancelled()

    @contextmanager
    def broken_off_by(self, break_off: Callable[[], object]) -> Iterator[None]:
        """While this runs, `break_off` is how to end it, called by another thread. Raises Cancelled for whatever came of that."""
        self.is_sent()
        with self._lock:
            self._break = break_off
        try:
            self.check()
            yield
        except Exception as error:
            if self._is_broken.is_set():
                raise _cancelled() from error
            raise
        finally:
            with self._lock:
                self._break = None

    def check(self) -> None:
        """Raises Cancelled where it was broken off."""
        if self._is_broken.is_set():
            raise _cancelled()

    def break_off(self) -> None:
        """End it, so that the server hears of it; for the thread that waits."""
        self._is_broken.set()
        with self._lock:
            if self._break is not None:
                self._break()


def _cancelled() -> Cancelled:
    return Cancelled("The call was cancelled")
