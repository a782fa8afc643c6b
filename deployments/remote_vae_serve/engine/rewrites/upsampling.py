"""Nearest upsampling folded into the convolution after it: one transposed convolution of the small input.

Of the nine taps of a 3x3 kernel over pixels that are each there twice, several fall on the same pixel of the small input: four
taps are left for each pixel of the result, whose weights are sums. All four together are a transposed convolution with a 4x4
kernel and stride 2. It takes 4/9 of the multiplications, and the large picture between the two is never made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from remote_vae_serve.engine.rewrites.casts import before_cast, cast_to
from remote_vae_serve.engine.rewrites.convolution import Convolution, convolution
from remote_vae_serve.engine.rewrites.deferred import Deferred, Function, Step, step_of
from remote_vae_serve.engine.rewrites.derived_weights import DerivedWeights
from remote_vae_serve.engine.rewrites.rewriting import Handler, Rewrite

NEAREST = ("nearest", "nearest-exact")
"""The same where the size is doubled."""
FOLDS = (3, 3), (1, 1), (1, 1), (1, 1), 1
"""Kernel, stride, padding, dilation and groups of the convolution."""
SUMS = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
"""Which of a kernel's three taps each of the four of the transposed one is the sum of, along an axis.

Result 2i is made of input i by taps 1 and 2 and of input i-1 by tap 0; result 2i+1 of input i by taps 0 and 1 and of input i+1 by
tap 2. A transposed convolution with stride 2 and padding 1 takes for 2i its taps 1 (of input i) and 3 (of i-1), for 2i+1 its
taps 2 (of i) and 0 (of i+1).
"""


@dataclass(frozen=True, eq=False)
class Upsampling(Step):
    """Nearest upsampling of `[B, C, H, W]` to twice height and width, in that dtype."""

    given: torch.Tensor
    dtype: torch.dtype

    def compute(self) -> torch.Tensor:
        return functional.interpolate(self.given.to(self.dtype), scale_factor=2.0, mode="nearest")


class FoldedUpsampling(Rewrite):
    """Folds nearest upsampling by 2 into a 3x3 convolution that follows it."""

    name = "folded_upsampling"

    def __init__(self) -> None:
        self._folded = DerivedWeights(_fold)

    def handlers(self) -> Mapping[Function, Handler]:
        return {
            functional.interpolate: self._upsample,
            torch.conv2d: self._convolve,
            torch.Tensor.to: self._cast,
            torch.Tensor.type_as: self._cast,
        }

    @staticmethod
    def _upsample(
        given: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *more: Any, **options: Any
    ) -> Any:
        by = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
        doubles = size is None and tuple(by) == (2, 2) and mode in NEAREST and given.ndim == 4
        if not doubles or any(more) or any(options.values()):
            return NotImplemented
        given, dtype = before_cast(given)
        batch, channels, height, width = given.shape
        return _upsampled(Upsampling(given, dtype), (batch, channels, 2 * height, 2 * width))

    @staticmethod
    def _cast(given: Any, *args: Any, **options: Any) -> Any:
        step = step_of(given, Upsampling)
        if step is None or (dtype := cast_to(given, args, options)) is None:
            return NotImplemented
        return _upsampled(replace(step, dtype=dtype), given.shape)

    def _convolve(self, *args: Any, **options: Any) -> Any:
        asked = convolution(*args, **options)
        step = None if asked is None else step_of(asked.given, Upsampling)
        if asked is None or step is None or asked.weight.dtype != step.dtype or _shape_of(asked) != FOLDS:
            return NotImplemented
        given = step.given.to(step.dtype)
        return torch.conv_transpose2d(given, self._folded.of(asked.weight), asked.bias, stride=2, padding=1)


def _shape_of(asked: Convolution) -> tuple[Any, ...]:
    return tuple(asked.weight.shape[2:]), asked.stride, asked.padding, asked.dilation, asked.groups


def _fold(weight: torch.Tensor) -> torch.Tensor:
    """The transposed kernel `[C, O, 4, 4]` of a kernel `[O, C, 3, 3]`."""
    sums = SUMS.to(weight.device)
    made = torch.einsum("ya,xb,ocab->coyx", sums, sums, weight.float())
    return made.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _upsampled(step: Upsampling, size: Sequence[int]) -> Deferred:
    return Deferred(step, size, torch.empty((), dtype=step.dtype, device=step.given.device))
