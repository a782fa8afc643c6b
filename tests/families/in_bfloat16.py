"""How far bfloat16 takes a case from float32, decode and encode, through the engine: what `Family.bfloat16` rests on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from families.case import Case
from families.through_engine import Served, serving
from remote_vae.protocol.encode_request import SampleMode

NEEDED = 45.0
"""dB, of what may run in bfloat16 unless somebody says otherwise."""


def psnr(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the range of what is exact. Minus infinity where ours is not finite."""
    assert ours.shape == exact.shape
    ours, exact = ours.double(), exact.double()
    error = (ours - exact).square().mean()
    ratio = float(10 * torch.log10((exact.max() - exact.min()).square() / error))
    return -math.inf if math.isnan(ratio) else ratio


def psnr_of(case: Case, folder: Path, **arguments: Any) -> dict[str, float | None]:
    """PSNR in dB of the case's pixels, and of its latents, moments or mode, whichever is worse; None where it has no encoder,
    or none that runs in bfloat16.

    The same latents and pixels go through the engine twice, in bfloat16 and in float32.

    Args:
        folder: empty.
        arguments: of `VAEConfig`.
    """
    with serving(case, folder / "float32", dtype="float32", encode_dtype="float32", **arguments) as served:
        exact = _decoded(served)
        pixels = _pixels(served)
        latents = _encoded(served, pixels)
    with serving(case, folder / "bfloat16", dtype="bfloat16", encode_dtype="bfloat16", **arguments) as served:
        decode = psnr(_decoded(served), exact)
        try:
            pairs = zip(_encoded(served, pixels), latents, strict=True)
        except NotImplementedError:  # by torch, on a CPU in bfloat16: avg_pool3d
            return {"decode": decode, "encode": None}
        return {"decode": decode, "encode": min((psnr(ours, theirs) for ours, theirs in pairs), default=None)}


def _decoded(served: Served) -> torch.Tensor:
    return torch.cat([served.ask(one) for one in served.latents().split(1)])


def _pixels(served: Served) -> torch.Tensor:
    """What the encoder is given: those of the case, else noise of the shape that its decoder makes."""
    if served.case.encode is not None:
        return served.engine.processor.preprocess_image(served.encode_request()).pixels
    unpacked = served.engine.processor.unpack_latents(served.request(served.latents()[:1]))
    whole = replace(unpacked.hints, num_frames=None)  # Allegro's encoder takes no clip that was cropped
    made = served.engine.decode(unpacked.latents, hints=whole).pixels
    noise = torch.rand(made.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    takes_frames_apart = noise.ndim == 5 and not served.engine.space.family.takes_time
    return noise.transpose(1, 2).flatten(0, 1) if takes_frames_apart else noise


def _encoded(served: Served, pixels: torch.Tensor) -> list[torch.Tensor]:
    engine = served.engine
    if engine.encodes is None:
        return []
    modes = [SampleMode.ARGMAX, *([SampleMode.MOMENTS] if engine.encodes == "moments" else [])]
    return [engine.encode(pixels.to(engine.encode_dtype), mode).latents for mode in modes]
