"""`Plan`: whether latents are decoded whole or in tiles, and of which size; and a model seen through one.

Diffusers' models have their tiling in switches on the module. Nobody turns one here on a module that others use: a plan is a view
of its own, with the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SIZES = (1024, 768, 512, 384, 256)
"""Edges of tiles in pixels, tried from the largest. Below 256 pixels seams show: benchmarks/results/tiling.md."""


@dataclass(frozen=True)
class Plan:
    """How to decode.

    Attributes:
        tile: pixels along the edge of a tile; None decodes the whole at once.
    """

    tile: int | None = None

    def __str__(self) -> str:
        return "" if self.tile is None else str(self.tile)


WHOLE = Plan()


def plans(height: int, width: int, has_tiling: bool) -> list[Plan]:
    """What to try for a picture of so many pixels, from the one that takes the most memory."""
    tiles = [Plan(size) for size in SIZES if size < max(height, width)]
    return [WHOLE, *(tiles if has_tiling else [])]


def view(model: Any, plan: Plan, tile: Callable[[Any, int, int], None] | None, ratio: int) -> Any:
    """The model with the plan's tiling: a shallow copy, whose switches are its own and whose weights are the model's.

    Args:
        tile: of the family; turns the tiling on, given the view, the size in pixels and the ratio.
    """
    if plan.tile is None or tile is None:
        return model
    seen = copy.copy(model)
    tile(seen, plan.tile, ratio)
    return seen
