"""Padding with zeros done by the convolution after it, which needs no copy of its input for that.

A causal convolution of videos pads height and width evenly and time in front, by `functional.pad`: a copy of all activations.
Even padding a convolution has of its own. Of one frame with two zero frames before it only the last slice of the kernel counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from remote_vae_serve.engine.rewrites.convolution import convolution, convolved
from remote_vae_serve.engine.rewrites.deferred import Deferred, Function, Step, step_of, value_of
from remote_vae_serve.engine.rewrites.derived_weights import DerivedWeights
from remote_vae_serve.engine.rewrites.rewriting import Handler, Rewrite


@dataclass(frozen=True, eq=False)
class Padding(Step):
    """`functional.pad` with zeros of `[B, C, (T,) H, W]`.

    Attributes:
        edges: before and after, along each axis of time and space.
    """

    given: torch.Tensor
    edges: tuple[tuple[int, int], ...]

    def compute(self) -> torch.Tensor:
        return functional.pad(self.given, [one for pair in reversed(self.edges) for one in pair])


class CausalPadding(Rewrite):
    """Has a convolution pad its input by itself."""

    name = "causal_padding"

    def __init__(self) -> None:
        self._last_slices = DerivedWeights(_last_slice)

    def handlers(self) -> Mapping[Function, Handler]:
        return {functional.pad: self._pad, torch.conv2d: self._convolve, torch.conv3d: self._convolve}

    @staticmethod
    def _pad(given: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
        axes = given.ndim - 2
        if mode != "constant" or value or axes not in (2, 3) or len(pad) > 2 * axes or min(pad, default=0) < 0:
            return NotImplemented
        given = value_of(given)
        numbers = [*pad, *(0,) * (2 * axes - len(pad))]
        edges = tuple((numbers[2 * axis], numbers[2 * axis + 1]) for axis in reversed(range(axes)))
        size = [edge + sum(pair) for edge, pair in zip(given.shape[2:], edges, strict=True)]
        return Deferred(Padding(given, edges), (*given.shape[:2], *size), given)

    def _convolve(self, *args: Any, **options: Any) -> Any:
        asked = convolution(*args, **options)
        step = None if asked is None or any(asked.padding) else step_of(asked.given, Padding)
        if asked is None or step is None or any(before != after for before, after in step.edges[-2:]):
            return NotImplemented
        given, weight, edges = step.given, asked.weight, [before for before, _ in step.edges]
        before, after = step.edges[0]
        if before != after:  # along time
            edges[0] = 0
            if (given.shape[2], before, after, asked.dilation[0]) == (1, weight.shape[2] - 1, 0, 1):
                weight = self._last_slices.of(weight)
            else:
                given = functional.pad(given, (0, 0, 0, 0, before, after))
        return convolved(replace(asked, given=given, weight=weight, padding=tuple(edges)))


def _last_slice(weight: torch.Tensor) -> torch.Tensor:
    """A kernel's weights `[O, C, kT, kH, kW]` for the last of its frames, `[O, C, 1, kH, kW]`."""
    return weight[:, :, -1:].contiguous(memory_format=torch.channels_last_3d)
