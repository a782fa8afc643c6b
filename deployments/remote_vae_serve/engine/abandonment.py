"""`Abandonment`: work that nobody waits for any more stops at its next tile or chunk.

Diffusers' models cut a picture in tiles, and a video in chunks of frames, in loops of their own, and run their decoder or encoder
once for each. There a hook asks; nothing of diffusers is changed. What is decoded as a whole has no such place, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Abandoned(Exception):
    """Nobody waits for what the device works on."""


class Abandonment:
    """Whether anybody still waits for the work in hand: the device's worker knows, the engine asks. For one thread, that of the
    device."""

    def __init__(self) -> None:
        self._is_wanted: Callable[[], bool] = _always

    @contextmanager
    def unless(self, is_wanted: Callable[[], bool]) -> Iterator[None]:
        """What runs within may be stopped once `is_wanted` says no, which is asked often and has to be quick."""
        self._is_wanted = is_wanted
        try:
            yield
        finally:
            self._is_wanted = _always

    @contextmanager
    def at_each(self, part: torch.nn.Module | None) -> Iterator[None]:
        """Ask before each call of a model's decoder or encoder; None, of a model without one, asks nowhere.

        Raises:
            Abandoned: out of that call.
        """
        if part is None:
            yield
            return
        hook = part.register_forward_pre_hook(self._ask)
        try:
            yield
        finally:
            hook.remove()

    def _ask(self, part: torch.nn.Module, given: Any) -> None:
        if not self._is_wanted():
            raise Abandoned


def _always() -> bool:
    return True
