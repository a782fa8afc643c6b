"""GroupNorm and the SiLU after it in one pass over the activations, by a kernel that keeps a row in the cache.

In torch they are three passes: mean and variance, the normalised, the activation. Here the last two are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from remote_vae_serve.engine.rewrites import kernels
from remote_vae_serve.engine.rewrites.channels_last import rows_of
from remote_vae_serve.engine.rewrites.deferred import Deferred, Function, Step, step_of, value_of
from remote_vae_serve.engine.rewrites.rewriting import Handler, Rewrite


@dataclass(frozen=True, eq=False)
class GroupNorm(Step):
    """`torch.nn.functional.group_norm` of `[B, C, ...]`."""

    given: torch.Tensor
    groups: int
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def compute(self) -> torch.Tensor:
        return functional.group_norm(self.given, self.groups, self.weight, self.bias, self.eps)


class GroupNormSiLU(Rewrite):
    """Fuses a GroupNorm with the SiLU after it."""

    name = "group_norm_silu"

    def handlers(self) -> Mapping[Function, Handler]:
        return {functional.group_norm: self._norm, functional.silu: self._silu}

    @staticmethod
    def _norm(given: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        given = value_of(given)
        return Deferred(GroupNorm(given, num_groups, weight, bias, eps), given.shape, given)

    @staticmethod
    def _silu(given: Any, inplace: bool = False) -> Any:
        step = step_of(given, GroupNorm)
        if step is None or inplace:
            return NotImplemented
        rows = rows_of(step.given)
        if rows is None or step.weight is None or step.bias is None or not kernels.takes(step.given):
            return functional.silu(step.compute(), inplace=True)
        made = torch.empty_like(step.given)
        into = rows_of(made)
        assert into is not None
        kernels.group_norm_silu(rows, into, step.groups, step.weight, step.bias, step.eps)
        return made
