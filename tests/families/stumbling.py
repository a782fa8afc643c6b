"""A decode that fails in the middle: where that is, and how it is made to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from families.through_engine import Served


class Stumbled(Exception):
    """In the middle of a decode."""


def last_step(served: Served) -> torch.nn.Module:
    """The innermost module that a decode ends with. One that goes chunk by chunk comes to it with chunks still before it."""
    called: list[torch.nn.Module] = []
    leaves = [module for module in served.model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(lambda module, given, made: called.append(module)) for leaf in leaves]
    served.ask(served.latents(1))
    for hook in hooks:
        hook.remove()
    return called[-1]


def stumble(module: torch.nn.Module) -> Callable[[], None]:
    """The module raises at its next call; what is returned takes that back."""

    def raise_it(*_: Any) -> None:
        raise Stumbled

    return module.register_forward_hook(raise_it).remove
