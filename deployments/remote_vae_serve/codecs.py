"""Pixels to what travels: uint8, JPEG, PNG, mp4, raw floats. Bytes in memory only; nothing here opens a file.

The rounding is that of diffusers' image processors: `(x / 2 + 0.5).clamp(0, 1)` in the decoder's dtype, then
`round(255 x)`, half to even, in float32.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from remote_vae.decoding import Output
from remote_vae.errors import BadRequest
from remote_vae.tensors import RawTensor, from_array
from remote_vae.wire import Result
from remote_vae_serve.families import Media
from remote_vae_serve.video import to_mp4

JPEG_QUALITY = 90


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


def write(pixels: torch.Tensor, output: Output, fps: float) -> Result:
    """The reply for decoded pixels.

    Args:
        pixels: `[B, C, H, W]` or `[B, C, T, H, W]`, nominally in [-1, 1], in the decoder's dtype.
        fps: frames a second, of a video.
    """
    if output is Output.MP4:
        return Result(output.media_type, np.frombuffer(to_mp4(to_uint8(pixels), fps), np.uint8))
    if output.is_image:
        picture = Image.fromarray(to_uint8(pixels)[0].numpy())
        return Result(output.media_type, np.frombuffer(_file(picture, output), np.uint8))
    raw = _tensor(pixels, output)
    return Result(output.media_type, raw.data, raw.dtype, raw.shape)


def frames_of(pixels: torch.Tensor) -> torch.Tensor:
    """Images as they are; the frames of one video `[1, C, T, H, W]` as `[T, C, H, W]`."""
    return pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """`[N, C, H, W]` in [0, 1], in the dtype of `pixels`."""
    return (frames_of(pixels) * 0.5 + 0.5).clamp(0, 1)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """`[N, H, W, C]`, contiguous."""
    return (to_unit(pixels).float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _tensor(pixels: torch.Tensor, output: Output) -> RawTensor:
    if output is Output.UINT8:
        return from_array(to_uint8(pixels))
    return from_array(to_unit(pixels) if output is Output.UNIT else pixels)


def _file(picture: Image.Image, output: Output) -> bytes:
    buffer = io.BytesIO()
    if output is Output.PNG:
        picture.save(buffer, "PNG", compress_level=1)  # a fifth of the default's time for a few per cent more bytes
    else:
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
