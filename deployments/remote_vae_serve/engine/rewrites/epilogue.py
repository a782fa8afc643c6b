"""A convolution with its epilogue: the residual that is added to what it makes, and the ReLU after that, in one pass.

oneDNN does both while the result is in registers (its post-ops, by the operators that torch.compile uses); elsewhere they are
done in place. In bfloat16 the sum is then rounded once and not twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from remote_vae_serve.engine.rewrites.convolution import Convolution, convolution, convolved
from remote_vae_serve.engine.rewrites.deferred import Deferred, Function, step_of, value_of
from remote_vae_serve.engine.rewrites.rewriting import Handler, Rewrite


class Epilogue(Rewrite):
    """Adds the residual, and applies the ReLU, within the convolution before."""

    name = "epilogue"

    def handlers(self) -> Mapping[Function, Handler]:
        handlers: dict[Function, Handler] = dict.fromkeys((torch.conv2d, torch.conv3d), self._convolve)
        handlers |= dict.fromkeys((torch.Tensor.add, torch.add), self._add)
        return {**handlers, functional.relu: self._relu, functional.dropout: self._drop}

    @staticmethod
    def _convolve(*args: Any, **options: Any) -> Any:
        asked = convolution(*args, **options)
        return NotImplemented if asked is None else convolved(replace(asked, given=value_of(asked.given)))

    @staticmethod
    def _add(first: Any, second: Any, **options: Any) -> Any:
        if options:
            return NotImplemented
        for made, other in ((second, first), (first, second)):
            step = step_of(made, Convolution)
            if step is None or step.residual is not None or not isinstance(other, torch.Tensor):
                continue
            if other.shape == made.shape and other.dtype == made.dtype and other.device == made.device:
                return convolved(replace(step, residual=value_of(other)))
        return NotImplemented

    @staticmethod
    def _relu(given: Any, inplace: bool = False) -> Any:
        step = step_of(given, Convolution)
        return NotImplemented if step is None or inplace else step.compute("relu")

    @staticmethod
    def _drop(given: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """No dropout outside of training: what waits goes on waiting."""
        return given if type(given) is Deferred and not training else NotImplemented
