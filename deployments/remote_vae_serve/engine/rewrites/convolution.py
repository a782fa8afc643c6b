"""`Convolution`: a call of `torch.conv2d` or `torch.conv3d` that has not run yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from remote_vae_serve.engine.rewrites.deferred import Deferred, Step

CONVOLVE = {4: torch.conv2d, 5: torch.conv3d}
SMALL = 2**14
"""Values below which torch has its own convolution; a pass more is nothing there."""


@dataclass(frozen=True, eq=False)
class Convolution(Step):
    """A convolution, and a residual that is added to what it makes.

    Attributes:
        given: `[B, C, (T,) H, W]`; may be one that waits itself.
        weight: `[O, C / groups, (kT,) kH, kW]`.
        bias: `[O]`, or None.
        stride, padding, dilation: along each axis of space and time.
        residual: of the result's shape, or None.
    """

    given: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    residual: torch.Tensor | None = None

    @property
    def size(self) -> list[int]:
        edges = zip(self.given.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        made = [
            (edge + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for edge, kernel, stride, pad, dilation in edges
        ]
        return [self.given.shape[0], self.weight.shape[0], *made]

    def compute(self, activation: str | None = None) -> torch.Tensor:
        """Run it; `activation` is `relu` or None."""
        numbers = list(self.padding), list(self.stride), list(self.dilation), self.groups
        if self._is_of_onednn():
            of_onednn, given = torch.ops.mkldnn._convolution_pointwise, (self.weight, self.bias, *numbers)
            if self.residual is None:
                made = of_onednn(self.given, *given, activation or "none", [], "")
            else:
                made = of_onednn.binary(self.given, self.residual, *given, "add", 1.0, activation, [], None)
            return made  # type: ignore[no-any-return]
        convolve = CONVOLVE[self.given.ndim]
        result = convolve(self.given, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.residual is not None:
            result.add_(self.residual)
        return result if activation is None else result.relu_()

    def _is_of_onednn(self) -> bool:
        """Whether oneDNN does it. Some in float32 torch would do by loops of its own, which do not keep the layout."""
        return (
            self.given.device.type == "cpu"
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
            and self.given.dtype in (torch.float32, torch.bfloat16)
            and self.given.numel() >= SMALL
        )


def convolution(
    given: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Convolution | None:
    """The step of such a call, by torch's own arguments; None of one that is padded by name, or has no batch."""
    if isinstance(padding, str) or given.ndim != weight.ndim:
        return None
    axes = weight.ndim - 2
    return Convolution(
        given, weight, bias, _each_axis(stride, axes), _each_axis(padding, axes), _each_axis(dilation, axes), groups
    )


def convolved(step: Convolution) -> Deferred:
    """What it makes."""
    return Deferred(step, step.size, step.given)


def _each_axis(number: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Stride, padding or dilation along each of so many axes."""
    numbers = (number,) if isinstance(number, int) else tuple(number)
    return numbers * axes if len(numbers) == 1 else numbers
