"""Which cases stand for a layout each: `make test` runs those, `make test-families` all."""

from __future__ import annotations

import pytest

from families.case import Case
from families.through_engine import CASES

FOR_LAYOUTS = (
    "AutoencoderKL: Stable Diffusion",
    "AutoencoderKL: Flux, packed",
    "AutoencoderKL: Kandinsky 5, channels last",
    "AutoencoderKL: AnimateDiff, frames folded into the batch",
    "AutoencoderRAE: tokens",
    "AutoencoderKLFlux2: ERNIE-Image, patches",
    "AutoencoderKLQwenImage: Layered, packed",
    "AutoencoderKLQwenImage: Anima, not packed",
    "AutoencoderKLHunyuanImageRefiner",
    "AutoencoderKLWan",
    "AutoencoderKLWan: JoyImage",
    "AutoencoderKLWan: JoyImage Plus",
    "AutoencoderKLLTXVideo: 0.9.0",
    "AutoencoderKLHunyuanVideo: Kandinsky 5",
    "AutoencoderKLCogVideoX",
)


def parameters(cases: tuple[Case, ...] = CASES) -> list[object]:
    """Of `pytest.mark.parametrize` or a fixture."""
    return [
        pytest.param(case, id=case.name, marks=() if case.name in FOR_LAYOUTS else pytest.mark.families)
        for case in cases
    ]
