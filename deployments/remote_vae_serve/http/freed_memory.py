"""`FreedMemory`: what large request bodies have taken goes back to the system soon after they have ended (`malloc_trim`).

glibc's malloc keeps freed blocks of up to 32 MiB for the process, and bodies come in such pieces: after some of 100 MiB a process
held 100 to 200 MiB that nothing used, for good.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from typing import Any

LARGE = 8 * 2**20
"""Bytes of a body after which it is worth the milliseconds."""
PAUSE_S = 2.0
"""As long as large bodies follow one another, the next one takes what the one before has freed."""


class FreedMemory:
    """Of one process; for its event loop."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def of_body(self, size: int) -> None:
        """A body of so many bytes has ended."""
        if size < LARGE:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(PAUSE_S, loop.run_in_executor, None, _trim)


def _trim() -> None:
    malloc_trim: Callable[[int], Any] = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)  # glibc's alone
    malloc_trim(0)
