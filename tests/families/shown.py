"""Which cases stand for a layout each, and which classes for the rest: `make test` runs those, `make test-families` all."""

from __future__ import annotations

from collections.abc import Iterable

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

SHOWN_CLASSES = (
    "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo", "AutoencoderRAE", "VQModel",
)  # fmt: skip
"""Pictures, patches, videos in tiles and by statistics, tokens, codes."""


def classes(names: Iterable[str]) -> list[object]:
    """Of `pytest.mark.parametrize`: names of classes."""
    return [pytest.param(name, marks=() if name in SHOWN_CLASSES else pytest.mark.families) for name in sorted(names)]


def parameters(cases: tuple[Case, ...] = CASES) -> list[object]:
    """Of `pytest.mark.parametrize` or a fixture."""
    return [
        pytest.param(case, id=case.name, marks=() if case.name in FOR_LAYOUTS else pytest.mark.families)
        for case in cases
    ]
