"""The division by 1: each ResnetBlock2D of diffusers divides by an `output_scale_factor` that is 1.0 in every VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from remote_vae_serve.engine.rewrites.deferred import Function
from remote_vae_serve.engine.rewrites.rewriting import Handler, Rewrite


class NoopDivision(Rewrite):
    """Drops a division by 1: the result is the tensor itself."""

    name = "noop_division"

    def handlers(self) -> Mapping[Function, Handler]:
        return {torch.Tensor.div: self._divide, torch.div: self._divide, torch.Tensor.__truediv__: self._divide}

    @staticmethod
    def _divide(dividend: Any, divisor: Any, **options: Any) -> Any:
        drops = type(divisor) in (int, float) and divisor == 1 and not options
        return dividend if drops and dividend.is_floating_point() else NotImplemented
