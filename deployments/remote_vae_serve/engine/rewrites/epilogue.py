"""A convolution with its epilogue: the residual that is added to what it makes, and the ReLU after that, in one pass.

oneDNN does both while the result is in registers (its post-ops, by the operators that torch.compile uses); elsewhere they are
done in place. In bfloat16 the sum is then rounded once and not twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from remote_vae_serve.engine.rewrites.deferred import Deferred, Function, Step, step_of, value_of
from remote_vae_serve.engine.rewrites.rewriting import Handler, Rewrite

CONVOLVE = {4: torch.conv2d, 5: torch.conv3d}


@dataclass(frozen=True, eq=False)
class Convolution(Step):
    """A convolution, and a residual that is added to what it makes.

    Attributes:
        given: `[B, C, (T,) H, W]`.
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


SMALL = 2**14
"""Values below which torch has its own convolution; a pass more is nothing there."""


class Epilogue(Rewrite):
    """Adds the residual, and applies the ReLU, within the convolution before."""

    name = "epilogue"

    def handlers(self) -> Mapping[Function, Handler]:
        handlers: dict[Function, Handler] = dict.fromkeys((torch.conv2d, torch.conv3d), self._convolve)
        handlers |= dict.fromkeys((torch.Tensor.add, torch.add), self._add)
        return {**handlers, functional.relu: self._relu, functional.dropout: self._drop}

    @staticmethod
    def _convolve(
        given: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if isinstance(padding, str) or given.ndim != weight.ndim:
            return NotImplemented
        axes = weight.ndim - 2
        stride, padding, dilation = (each_axis(one, axes) for one in (stride, padding, dilation))
        step = Convolution(value_of(given), weight, bias, stride, padding, dilation, groups)
        return Deferred(step, step.size, step.given)

    @staticmethod
    def _add(first: Any, second: Any, **options: Any) -> Any:
        if options:
            return NotImplemented
        for made, other in ((second, first), (first, second)):
            step = step_of(made, Convolution)
            if step is None or step.residual is not None or not isinstance(other, torch.Tensor):
                continue
            if other.shape == made.shape and other.dtype == made.dtype and other.device == made.device:
                return Deferred(replace(step, residual=value_of(other)), made.shape, step.given)
        return NotImplemented

    @staticmethod
    def _relu(given: Any, inplace: bool = False) -> Any:
        step = step_of(given, Convolution)
        return NotImplemented if step is None or inplace else step.compute("relu")

    @staticmethod
    def _drop(given: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """No dropout outside of training: what waits goes on waiting."""
        return given if type(given) is Deferred and not training else NotImplemented


def each_axis(number: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Stride, padding or dilation along each of so many axes."""
    numbers = (number,) if isinstance(number, int) else tuple(number)
    return numbers * axes if len(numbers) == 1 else numbers
