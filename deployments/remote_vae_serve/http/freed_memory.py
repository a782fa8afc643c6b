"""`FreedMemory`: what large request bodies have taken goes back to the system soon after they have ended (`malloc_trim`).

glibc's malloc keeps freed blocks of up to 32 MiB for the process, and bodies come in such pieces: after some of 100 MiB a process
held 100 to 200 MiB that nothing used, for good. Of heaps of other threads than the first `malloc_trim` leaves out the end, up to
64 MiB each; that is given back as soon as it is freed, by a parameter of `mallopt`.
"""

from __future__ import annotations

import asyncio
import ctypes
import os

LARGE = 8 * 2**20
"""Bytes of a body after which it is worth the milliseconds."""
TRIM_THRESHOLD = -1
"""The parameter: how much may lie free at a heap's end. glibc raises it by itself unless it is set."""
ONE_HEAP = ("MALLOC_ARENA_MAX", "1")
"""In the environment of a process whose threads share one heap: a replica on a CPU, which sets the parameter itself for each
decode (`engine.memory.malloc_cache`) and would keep no memory any more."""
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
        elif ONE_HEAP not in os.environ.items():  # at the first: where none comes, small blocks stay, as is faster
            _of_glibc("mallopt", TRIM_THRESHOLD, LARGE)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(PAUSE_S, loop.run_in_executor, None, _of_glibc, "malloc_trim", 0)


def _of_glibc(function: str, *arguments: int) -> None:
    """Call it where there is a glibc."""
    getattr(ctypes.CDLL(None), function, lambda *_: None)(*arguments)
