"""The walk of one request through a replica, module by module: `python tools/walk.py`.

Decodes and encodes once on the bundled demo VAE, from `Pipeline` to the result, and writes down every call into a module of
this project, on whichever thread. A stay is a run of calls into one module; a turn is a stay in a module that was left before.
Few turns mean that the code can be read in the order in which it runs.

The first request of a shape is walked, not a later one: it is the one that plans. What a forecast of memory does inside is left
out: it runs the whole model a second time, on torch's meta device, and its calls are those of the decode.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
HOUSES = (ROOT / "deployments" / "remote_vae_serve", ROOT / "client" / "remote_vae")


class Walk:
    """The modules that calls went into, in order; stays of one module are one entry.

    Attributes:
        closed: parts of paths that are one room however many calls are made inside.
    """

    def __init__(self, closed: tuple[str, ...] = ()) -> None:
        self.stays: list[str] = []
        self._closed = closed
        self._lock = threading.Lock()

    @property
    def turns(self) -> list[str]:
        """The modules that were entered again, once for each time."""
        return [stay for number, stay in enumerate(self.stays) if stay in self.stays[:number]]

    def record(self, run: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            asyncio.run(run())
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code.co_name.startswith(
            "<"
        ):  # a lambda or a comprehension is a part of a function
            return
        module = _module(frame.f_code.co_filename)
        caller = frame.f_back
        while module is not None and caller is not None:  # inside of a closed room everything is that room
            above = _module(caller.f_code.co_filename)
            if above is not None and any(part in above for part in self._closed):
                return
            caller = caller.f_back
        if module is None:
            return
        with self._lock:
            if not self.stays or self.stays[-1] != module:
                self.stays.append(module)

    def __str__(self) -> str:
        seen: set[str] = set()
        lines = []
        for stay in self.stays:
            lines.append(f"  {'<-' if stay in seen else '  '} {stay}")
            seen.add(stay)
        rooms = len(seen)
        return "\n".join([*lines, f"  {len(self.stays)} stays in {rooms} modules, {len(self.turns)} turns"])


def _module(file: str) -> str | None:
    path = Path(file)
    return next((str(path.relative_to(house.parent)) for house in HOUSES if path.is_relative_to(house)), None)
