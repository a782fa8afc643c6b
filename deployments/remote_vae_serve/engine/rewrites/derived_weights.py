"""`DerivedWeights`: weights that a rewrite makes of a model's own, once each."""

from __future__ import annotations

from collections.abc import Callable

import torch


class DerivedWeights:
    """Made at their first use, and kept as long as the model's.

    Args:
        derive: makes one of a weight of the model.
    """

    def __init__(self, derive: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._derive = derive
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """What is derived of that weight."""
        known = self._made.get(id(weight))
        if known is None:  # the weight is kept too, or its number might become another's
            known = self._made[id(weight)] = weight, self._derive(weight)
        return known[1]
