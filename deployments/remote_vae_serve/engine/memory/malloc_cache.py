"""`MallocCache`: what glibc's malloc has freed is kept for the next operation like it, on a CPU; it is given back before another
and in a pause.

glibc hands large blocks back to the kernel as soon as they are freed, and the kernel clears each page again when it is next
touched: 12 GB in a 512x512 decode of Stable Diffusion's VAE. What that costs: python -m benchmarks.kept_memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Hashable

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""Of glibc, which reads it when a process starts: heaps other than the first have no room for large blocks. A process without it
keeps nothing."""
SHARE = 4
"""Free blocks are of all sizes, and the next work does not fill them all: kept, memory peaked at up to three times the forecast.
Memory is kept only where the budget has room for so many of it."""
TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`: how much may lie free at the heap's end (-1: any), and how many blocks may lie outside it."""
KEEP, LET_GO = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}, {TRIM_THRESHOLD: 2**17, MMAP_MAX: 2**16}


class MallocCache:
    """Sets what glibc's malloc keeps of freed memory, for the whole process.

    Attributes:
        works: whether this process can; if not, nothing here does anything.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self.works = os.environ.items() >= ENVIRONMENT.items() and hasattr(library, "mallopt")
        self._mallopt: Callable[[int, int], int] = library.mallopt if self.works else lambda parameter, value: 0
        self._trim: Callable[[int], int] = library.malloc_trim if self.works else lambda pad: 0
        self._of: Hashable = None

    def prepare(self, work: Hashable, needed: int, free: int) -> None:
        """Keep memory for this operation or not; to be called before it, on its thread.

        Args:
            work: what memory is kept for; that which another operation has freed would take room beside it.
            needed, free: bytes that it is estimated to take, and that are left of the budget.
        """
        keeps = SHARE * needed <= free
        if (work, keeps) == self._of:
            return
        self.give_back()
        for parameter, value in (KEEP if keeps else LET_GO).items():
            self._mallopt(parameter, value)
        self._of = work, keeps

    def give_back(self) -> None:
        """Return all that is free to the system (`malloc_trim`)."""
        self._trim(0)
        self._of = None
