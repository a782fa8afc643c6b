"""Blend pixels with alpha over white, for files that have no alpha."""

from __future__ import annotations

import torch


def over_white(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., 3]` of uint8 pixels with alpha, `[..., 4]`: a JPEG and an mp4 have none. Those of 3 channels as they are."""
    if pixels.shape[-1] == 3:
        return pixels
    colours, alpha = pixels[..., :3].int(), pixels[..., 3:].int()
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
