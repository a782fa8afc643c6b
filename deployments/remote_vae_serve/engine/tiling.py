"""`TilingPlan`: tiling of a batch: whether it is decoded whole, sample by sample, or in tiles, and of which size; a model with
tiling on.

Diffusers' models have their tiling in switches on the module. Nobody turns one here on a module that others use: a plan is a view
of its own, with the same weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SIZES = (1024, 768, 512, 384, 256)
"""Edges of tiles in pixels, tried from the largest. Below 256 pixels seams show: benchmarks/results/tiling.md."""


@dataclass(frozen=True)
class TilingPlan:
    """The tiling of a decode or an encode.

    Attributes:
        tile: pixels along the edge of a tile; None works on the whole picture at once.
        one_by_one: each sample of a batch by itself: exact, and a batch of any size takes little more than one.
    """

    tile: int | None = None
    one_by_one: bool = False

    def __str__(self) -> str:
        """What the client is told: only tiles change a picture."""
        return "" if self.tile is None else str(self.tile)

    @property
    def each(self) -> TilingPlan:
        """The same for one sample."""
        return TilingPlan(self.tile)

    def takes_less_than(self, other: TilingPlan) -> bool:
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[float, bool]:
        return (math.inf if self.tile is None else self.tile), not self.one_by_one


UNTILED, ONE_BY_ONE = TilingPlan(), TilingPlan(one_by_one=True)


def plans(height: int, width: int, has_tiling: bool, batch: int = 1, has_batches: bool = True) -> list[TilingPlan]:
    """What to try for pictures of so many pixels, from the plan that takes the most memory.

    Args:
        batch: how many. Where it takes tiles, several are never in work at once: larger tiles fit, and seams are fewer.
        has_batches: whether a batch at once is worth anything to the model.
    """
    alone = batch == 1
    whole = [UNTILED] if alone else [UNTILED, ONE_BY_ONE] if has_batches else [ONE_BY_ONE]
    tiles = [TilingPlan(size, one_by_one=not alone) for size in SIZES if size < max(height, width)]
    return [*whole, *(tiles if has_tiling else [])]


def view(model: Any, plan: TilingPlan, tile: Callable[[Any, int, int], None] | None, ratio: int) -> Any:
    """The model with the plan's tiling: a shallow copy, whose switches are its own and whose weights are the model's.

    Args:
        tile: of the family; turns the tiling on, given the view, the size in pixels and the ratio.
    """
    if plan.tile is None or tile is None:
        return model
    seen = copy.copy(model)
    tile(seen, plan.tile, ratio)
    return seen
