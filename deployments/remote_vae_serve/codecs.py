"""Pixels to what travels: uint8, JPEG, PNG, mp4, raw floats. Bytes in memory only; nothing here opens a file.

The rounding is that of diffusers' image processors: `(x / 2 + 0.5).clamp(0, 1)` in the decoder's dtype, then
`round(255 x)`, half to even, in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from remote_vae.decoding import Output
from remote_vae.errors import BadRequest
from remote_vae.tensors import from_array
from remote_vae.wire import Result
from remote_vae_serve.layouts import Media
from remote_vae_serve.png import to_png
from remote_vae_serve.transfer import HostCopy
from remote_vae_serve.video import to_mp4

JPEG_QUALITY = 90
PIECE = 2**22
"""Values that become uint8 at a time: all at once they take twice the memory of the pixels, and on a CPU twice the time."""


def check_output(output: Output, batch: int, media: Media) -> None:
    """Refuse what one reply cannot hold, before the decoder runs.

    Args:
        batch: number of images or videos the latents make.

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


def check_size(output: Output, height: int, width: int) -> None:
    """Refuse a picture larger than its format can hold. Raises BadRequest naming another."""
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


def leave(pixels: torch.Tensor, output: Output) -> torch.Tensor:
    """What leaves the device for an output, of pixels that are on it: as few bytes as the output needs.

    Args:
        pixels: `[B, C, H, W]` or `[B, C, T, H, W]`, nominally in [-1, 1], in the decoder's dtype.

    Returns:
        The pixels (PT), `[N, C, H, W]` in [0, 1] (UNIT), or uint8 `[N, H, W, C]` (all others).
    """
    if output is Output.PT:
        return pixels
    return to_unit(pixels) if output is Output.UNIT else to_uint8(pixels)


def write(pixels: HostCopy, output: Output, fps: float) -> Result:
    """The reply for what left the device.

    Args:
        pixels: of what `leave` made for the same output.
        fps: frames a second, of a video.
    """
    if output is Output.MP4:
        frames = (over_white(piece) for piece in pixels.pieces())
        return _file(output, to_mp4(frames, (*pixels.shape[:3], 3), fps))
    if output is Output.PNG:
        return _file(output, to_png(pixels.whole()[0].numpy()))
    if output is Output.JPEG:
        return _file(output, to_jpeg(over_white(pixels.whole()[0]).numpy()))
    raw = from_array(pixels.whole())
    return Result(output.media_type, raw.data, raw.dtype, raw.shape)


def to_jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A JPEG of pixels `[H, W, 3]`, by libjpeg-turbo with the GIL let go (Pillow holds it: two threads were slower than one)."""
    # Not the binding's default of 4:4:4; half the colour is what Pillow, and with it every server of the protocol, writes.
    return bytes(simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, "RGB", "420", fastdct=False))


def over_white(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., 3]` of uint8 pixels with alpha, `[..., 4]`: a JPEG and an mp4 have none. Those of 3 channels as they are."""
    if pixels.shape[-1] == 3:
        return pixels
    colours, alpha = pixels[..., :3].int(), pixels[..., 3:].int()
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def frames_of(pixels: torch.Tensor) -> torch.Tensor:
    """Images as they are; the frames of one video `[1, C, T, H, W]` as `[T, C, H, W]`."""
    return pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """`[N, C, H, W]` in [0, 1], in the dtype of `pixels`, contiguous."""
    frames = frames_of(pixels)
    # Written to where it stays: one copy of the pixels, not three.
    unit = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device)
    return torch.mul(frames, 0.5, out=unit).add_(0.5).clamp_(0, 1)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """`[N, H, W, C]`, contiguous."""
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


def _file(output: Output, file: bytes) -> Result:
    return Result(output.media_type, np.frombuffer(file, np.uint8))
