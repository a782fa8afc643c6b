"""The RMS norm of Wan and its kin, over channels, and the SiLU after it, in one pass over the activations.

In torch it is a norm, a division, two products, a sum and the activation: each a pass, and in bfloat16 each rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from remote_vae_serve.engine.rewrites import kernels
from remote_vae_serve.engine.rewrites.casts import before_cast, cast_to
from remote_vae_serve.engine.rewrites.channels_last import rows_of
from remote_vae_serve.engine.rewrites.deferred import Deferred, Function, Step, step_of
from remote_vae_serve.engine.rewrites.rewriting import Handler, Rewrite


@dataclass(frozen=True, eq=False)
class RMSNorm(Step):
    """`functional.normalize` of `[B, C, (T,) H, W]` over the channels, times `factor` and `weight`, plus `bias`.

    Attributes:
        dtype: of the result.
        weight, bias: of C values, in a shape that broadcasts; or None.
    """

    given: torch.Tensor
    dtype: torch.dtype
    eps: float
    factor: float = 1.0
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def compute(self, activates: bool = False) -> torch.Tensor:
        """Run it, and SiLU after it if it `activates`."""
        rows = rows_of(self.given)
        if (
            rows is None
            or self.weight is None
            or self.dtype != self.given.dtype
            or self.eps != kernels.EPS
            or not kernels.takes(self.given)
        ):
            return self._by_torch(activates)
        made = torch.empty_like(self.given)
        into = rows_of(made)
        assert into is not None
        kernels.rms_norm(rows, into, self.weight.float() * self.factor, self.bias, activates)
        return made

    def _by_torch(self, activates: bool) -> torch.Tensor:
        widest = torch.promote_types(self.dtype, torch.float32) if self.given.dtype.itemsize < 4 else self.dtype
        made = functional.normalize(self.given.to(widest), dim=1, eps=self.eps).to(self.dtype)
        if self.factor != 1:
            made.mul_(self.factor)
        if self.weight is not None:
            made.mul_(self.weight)
        if self.bias is not None:
            made.add_(self.bias)
        return functional.silu(made, inplace=True) if activates else made


class RMSNormSiLU(Rewrite):
    """Fuses an RMS norm over channels with its weight, its bias and the SiLU after it."""

    name = "rms_norm_silu"

    def handlers(self) -> Mapping[Function, Handler]:
        return {
            functional.normalize: self._normalize,
            torch.Tensor.to: self._cast,
            torch.Tensor.mul: self._multiply,
            torch.Tensor.add: self._add,
            functional.silu: self._silu,
        }

    @staticmethod
    def _normalize(given: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
        if p != 2 or dim != 1 or given.ndim not in (4, 5) or out is not None:
            return NotImplemented
        given, dtype = before_cast(given)
        return _normalized(RMSNorm(given, dtype, eps))

    @staticmethod
    def _cast(given: Any, *args: Any, **options: Any) -> Any:
        step = step_of(given, RMSNorm)
        if step is None or (dtype := cast_to(given, args, options)) is None:
            return NotImplemented
        is_first = step.factor == 1 and step.weight is None and step.bias is None
        return _normalized(replace(step, dtype=dtype)) if is_first else NotImplemented

    @staticmethod
    def _multiply(given: Any, by: Any) -> Any:
        step = step_of(given, RMSNorm)
        if step is None or step.bias is not None or step.weight is not None:
            return NotImplemented
        if type(by) in (int, float):
            return _normalized(replace(step, factor=step.factor * by))
        return _normalized(replace(step, weight=by)) if _is_of_channels(by, given) else NotImplemented

    @staticmethod
    def _add(given: Any, summand: Any, **options: Any) -> Any:
        step = step_of(given, RMSNorm)
        if step is None or step.bias is not None or options:
            return NotImplemented
        if type(summand) in (int, float) and summand == 0:
            return given
        return _normalized(replace(step, bias=summand)) if _is_of_channels(summand, given) else NotImplemented

    @staticmethod
    def _silu(given: Any, inplace: bool = False) -> Any:
        step = step_of(given, RMSNorm)
        return NotImplemented if step is None or inplace else step.compute(activates=True)


def _normalized(step: RMSNorm) -> Deferred:
    return Deferred(step, step.given.shape, torch.empty((), dtype=step.dtype, device=step.given.device))


def _is_of_channels(parameter: Any, given: torch.Tensor) -> bool:
    """Whether it has a value for each channel, and broadcasts along the other axes."""
    if not isinstance(parameter, torch.Tensor) or parameter.dtype != given.dtype:
        return False
    channels, axes = given.shape[1], given.ndim - 2
    shape = tuple(parameter.shape)
    return shape in ((channels, *(1,) * axes), (1, channels, *(1,) * axes))
