"""`Case`: one convention of latents, with what diffusers' own pipeline makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Origin = Literal["pipeline", "end of pipeline", "module"]
"""Of a reference: a whole tiny pipeline was called; its own code after the denoising was; or no pipeline has the class."""


@dataclass(frozen=True)
class Encode:
    """What the family's own pipeline makes of pixels.

    Attributes:
        pixels: `[B, 3, H, W]` or `[B, 3, T, H, W]` in [-1, 1].
        reference: the latents as the pipeline's own code computes them, before it packs them or adds noise.
        mode: how it takes them from the distribution.
        seed: of the CPU generator the reference was made with, where it samples.
    """

    pixels: Callable[[], torch.Tensor]
    reference: Callable[[Any, torch.Tensor], torch.Tensor]
    mode: Literal["sample", "argmax"]
    origin: Origin
    seed: int | None = None


@dataclass(frozen=True)
class Case:
    """One convention.

    Attributes:
        name: the class, and a variant after a colon where there are several.
        build: a tiny module in float32, its weights from a fixed seed, its statistics far from 0 and 1.
        latents: a batch as the pipeline hands it out with `output_type="latent"`.
        reference: the pixels that the pipeline makes of them: `[B, C, H, W]` or `[B, F, C, H, W]` in [0, 1].
        parameters: what a human has to say with the request.
        pipelines: those it stands for.
    """

    name: str
    class_name: str
    build: Callable[[], Any]
    latents: Callable[[Any], torch.Tensor]
    reference: Callable[[Any, torch.Tensor], torch.Tensor]
    media: Literal["image", "video"]
    origin: Origin
    pipelines: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    encode: Encode | None = None
    notes: str = ""
