"""Spill directory: where Ray moves objects (latents, results) when its object store is full; in memory, for its owner alone.

Ray's own choice is its session folder, on a disk, where every user of the machine may read what is spilled.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from remote_vae.ray_internals import SPILL_VARIABLE, UNFUSED_VARIABLES

MEMORY = Path("/dev/shm")
"""A tmpfs on every Linux."""
PREFIX = "remote-vae-spill-"
LEAST = 2**30
"""Bytes that must be free there: in a container it may have 64 MiB, and Ray itself does without it."""


@contextmanager
def spill_directory(environment: Mapping[str, str], is_ours: bool = True) -> Iterator[Mapping[str, str]]:
    """What to add to the environment of a Ray; at the end the folder is gone, and whatever is in it.

    Yields:
        Nothing where the Ray is not ours; no directory where the environment names one, or there is no memory to spill to.
    """
    if not is_ours:
        yield {}
        return
    if SPILL_VARIABLE in environment or not has_room():
        yield UNFUSED_VARIABLES
        return
    _sweep()
    folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=MEMORY)  # mode 0700
    try:
        yield {SPILL_VARIABLE: folder, **UNFUSED_VARIABLES}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Remove what launchers have left that were killed."""
    for left in MEMORY.glob(f"{PREFIX}*"):
        pid = left.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)  # what is another user's stays


def has_room() -> bool:
    """Whether there is a file system in memory, with some room."""
    return MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= LEAST
