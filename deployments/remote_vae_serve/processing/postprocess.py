"""Postprocess decoded pixels on the device: what leaves it for each output, as uint8 or in [0, 1].

The rounding is that of diffusers' `VaeImageProcessor.postprocess`: `(x / 2 + 0.5).clamp(0, 1)` in the decoder's dtype, then
`round(255 x)`, half to even, in float32.
"""

from __future__ import annotations

import torch

from remote_vae.errors import BadRequest
from remote_vae.protocol.output import Output
from remote_vae_serve.families.layouts import Media

PIECE = 2**22
"""Values that become uint8 at a time: all at once they take twice the memory of the pixels, and on a CPU twice the time."""


def check_output(output: Output, batch: int, media: Media, height: int, width: int) -> None:
    """Refuse what one reply cannot hold, before the decoder runs.

    Args:
        batch: number of images or videos that the latents make.
        height, width: of each, in pixels.

    Raises:
        BadRequest: naming a way out.
    """
    if output.is_image and media == "video":
        raise BadRequest(
            "These latents make a video, and output_type=pil is one image; "
            "ask for output_type=mp4, or for the frames: output_type=pil with a processor (Accept: tensor/binary)",
            parameter="output_type",
        )
    if output.is_image and batch > 1:
        raise BadRequest(
            f"A reply holds one image and the batch has {batch}; send one request per image, "
            "or ask for output_type=pt with partial_postprocess=true",
            parameter="shape",
        )
    if output is Output.MP4 and media == "image":
        raise BadRequest(
            "output_type=mp4 is for videos; these latents make images: ask for pil or pt", parameter="output_type"
        )
    if media == "video" and batch > 1 and output is not Output.PT:
        raise BadRequest(
            f"A reply holds one video and the batch has {batch}; send one request per video, or ask for output_type=pt",
            parameter="shape",
        )
    limits = {
        Output.JPEG: (65500, "image_format=png"),
        Output.MP4: (16384, "output_type=pt with partial_postprocess=true"),
    }
    limit, instead = limits.get(output, (max(height, width), ""))
    if max(height, width) > limit:
        raise BadRequest(
            f"The result is {width} x {height} pixels, and {output.value} holds at most {limit} along an edge; "
            f"ask for {instead}",
            parameter="shape",
        )


def to_output(pixels: torch.Tensor, output: Output) -> torch.Tensor:
    """What leaves the device for an output: as few bytes as the output needs.

    Args:
        pixels: `[B, C, H, W]` or `[B, C, T, H, W]`, nominally in [-1, 1], in the decoder's dtype.

    Returns:
        The pixels (PT), `[N, C, H, W]` in [0, 1] (UNIT), or uint8 `[N, H, W, C]` (all others); N is the batch, or the frames of
        one video.
    """
    if output is Output.PT:
        return pixels
    return to_unit(pixels) if output is Output.UNIT else to_uint8(pixels)


def frames_of(pixels: torch.Tensor) -> torch.Tensor:
    """Images `[B, C, H, W]` as they are; the frames of one video `[1, C, T, H, W]` as `[T, C, H, W]`."""
    return pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as `[N, C, H, W]` in [0, 1], clamped, in the dtype of `pixels`, contiguous."""
    frames = frames_of(pixels)
    # Written to where it stays: one copy of the pixels, not three.
    unit = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device)
    return torch.mul(frames, 0.5, out=unit).add_(0.5).clamp_(0, 1)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as uint8 `[N, H, W, C]`, contiguous."""
    frames = frames_of(pixels)
    count, channels, height, width = frames.shape
    made = torch.empty((count, height, width, channels), dtype=torch.uint8, device=frames.device)
    together = max(1, PIECE // (channels * height * width))
    rows = height if together > 1 else min(height, max(1, PIECE // (channels * width)))
    for first in range(0, count, together):
        for top in range(0, height, rows):
            here = slice(first, first + together), slice(top, top + rows)
            made[here] = _rounded(frames[here[0], :, here[1]])  # nothing of it is left when the next is made
    return made


def _rounded(images: torch.Tensor) -> torch.Tensor:
    return to_unit(images).float().mul_(255).round_().permute(0, 2, 3, 1)
