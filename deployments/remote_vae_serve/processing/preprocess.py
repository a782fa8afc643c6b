"""Preprocess what clients send to be encoded, files of pictures, uint8 or floats, to pixels in [-1, 1] that fit the model.

Pictures (files and uint8) are resized to the next smaller multiple of the ratio with the Lanczos filter and mapped to
[-1, 1] in float32: the steps of diffusers' `VaeImageProcessor.preprocess`. Floats are taken as they are.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps

from remote_vae.errors import BadRequest
from remote_vae.protocol.encode_request import EncodeRequest, Picture, in_rgb, in_rgba
from remote_vae.protocol.tensors import RawTensor, to_numpy, to_torch
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.processing.finite import is_finite

MAX_PIXELS = 2**26
"""Of a file's picture: 8192 x 8192. Looked at before a pixel is decoded."""
ROWS = 64
"""Of a picture that are brought to [-1, 1] at a time."""
FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, eq=False)
class Prepared:
    """Pixels as an encoder takes them.

    Attributes:
        pixels: `[B, 3, H, W]`, or `[B, 3, T, H, W]` for a video model.
        frames: how many frames of one video each run of images in the batch is; None where they are images.
    """

    pixels: torch.Tensor
    frames: int | None = None


def prepare(request: EncodeRequest, space: LatentSpace) -> Prepared:
    """The pixels of a request as the model's encoder takes them, float32 or the dtype in which they were sent.

    Raises:
        BadRequest: naming what is wrong with them.
    """
    image = request.image
    is_pixels = isinstance(image, RawTensor) and image.dtype != "uint8"
    pixels = _as_taken(space, lambda: to_torch(cast(RawTensor, image)) if is_pixels else from_pictures(image, space))
    if not is_finite(pixels):
        raise BadRequest("The pixels contain NaN or infinity; nothing can be encoded from them", parameter="tensor")
    if space.family.takes_time or pixels.ndim == 4:
        # As `preprocess` leaves them, channels last: a convolution rounds otherwise for other strides.
        return Prepared(pixels)
    return Prepared(pixels.transpose(1, 2).flatten(0, 1), frames=pixels.shape[2])


def announced_shape(image: RawTensor, space: LatentSpace) -> tuple[int, ...]:
    """The shape of the pixels that `prepare` makes of those which have not come yet. Raises BadRequest as it does."""
    shape = image.shape
    if image.dtype == "uint8":
        _refuse_alpha(image, space)
        height, width = _multiples(shape[-3], shape[-2], space)
        count, channels = shape[0] if len(shape) == 4 else 1, space.pixel_channels
        as_frames = space.family.media == "video" and space.family.takes_time
        shape = (1, channels, count, height, width) if as_frames else (count, channels, height, width)
    taken = _as_taken(space, lambda: torch.empty(shape, device="meta"))
    return tuple(
        taken.shape if space.family.takes_time or taken.ndim == 4 else taken.transpose(1, 2).flatten(0, 1).shape
    )


def _as_taken(space: LatentSpace, read: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The pixels that were read with all axes, `[B, C, (T,) H, W]`. Raises BadRequest where the encoder takes no such shape."""
    pixels, of_videos = read(), space.family.takes_time
    shape = list(pixels.shape)
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.ndim == 4 and of_videos:
        pixels = pixels[:, :, None]  # each image is a video of one frame
    channels = space.pixel_channels
    if pixels.shape[1] != channels:
        raise BadRequest(
            f"The pixels have shape {shape}; expected {channels} channels: [B, {channels}, H, W], [{channels}, H, W] or a video "
            f"[B, {channels}, T, H, W]",
            parameter="shape",
        )
    height, width = pixels.shape[-2:]
    if height % space.ratio or width % space.ratio:
        raise BadRequest(
            f"The pixels are {width} x {height}; {space.class_name} takes multiples of {space.ratio}. Resize them, or send "
            "them as uint8 or as a picture, which are resized here",
            parameter="shape",
        )
    counted = of_videos and not space.family.any_frames
    if counted and space.temporal_ratio and (pixels.shape[2] - 1) % space.temporal_ratio:
        raise BadRequest(
            f"The video has {pixels.shape[2]} frames; {space.class_name} takes 1 and a multiple of {space.temporal_ratio}: "
            f"1, {1 + space.temporal_ratio}, {1 + 2 * space.temporal_ratio}, ...",
            parameter="shape",
        )
    return pixels


def from_pictures(image: RawTensor | Picture, space: LatentSpace) -> torch.Tensor:
    """A picture's file, or uint8 pixels `[H, W, C]` or `[N, H, W, C]`, resized as `VaeImageProcessor.preprocess` does.

    Returns:
        float32 in [-1, 1]: `[N, C, H, W]`, or `[1, C, N, H, W]` for a model of videos.

    Raises:
        BadRequest: no picture, too large, too small, or with alpha where the model takes none.
    """
    pictures: Iterable[Image.Image]
    if isinstance(image, RawTensor):
        _refuse_alpha(image, space)
        array = to_numpy(image)
        array = array if array.ndim == 4 else array[None]
        (count, height, width), pictures = array.shape[:3], map(Image.fromarray, array)  # one at a time
    else:
        picture = open_picture(image, space.pixel_channels == 4)
        count, height, width, pictures = 1, picture.height, picture.width, (picture,)
    height, width = _multiples(height, width, space)
    channels_last = torch.empty((count, height, width, space.pixel_channels), dtype=torch.float32)
    for one, pixels in zip(pictures, channels_last.numpy(), strict=True):
        _write_signed(one, pixels)
    made = channels_last.permute(0, 3, 1, 2)
    as_frames = space.family.media == "video" and space.family.takes_time
    return made.transpose(0, 1)[None] if as_frames else made


def _write_signed(picture: Image.Image, pixels: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Write a picture in [-1, 1] to `[H, W, C]`, resized to it, opaque where it has no alpha. Some rows at a time, in place: each
    step of `VaeImageProcessor` on the whole picture is a copy of it, and a file of 64 KB may hold 8192 x 8192."""
    height, width, channels = pixels.shape
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    for top in range(0, height, ROWS):
        rows = np.asarray(picture.crop((0, top, width, min(top + ROWS, height))))
        signed = pixels[top : top + ROWS, :, : rows.shape[-1]]
        np.divide(rows, 255.0, out=signed, dtype=np.float32)
        signed *= 2.0
        signed -= 1.0
        if rows.shape[-1] < channels:
            pixels[top : top + ROWS, :, rows.shape[-1] :] = 1.0


def _refuse_alpha(image: RawTensor, space: LatentSpace) -> None:
    if image.shape[-1] > space.pixel_channels:
        raise BadRequest(
            f"The pixels have shape {list(image.shape)}, with alpha; {space.class_name} takes 3 channels: leave the fourth out",
            parameter="shape",
        )


def _multiples(height: int, width: int, space: LatentSpace) -> tuple[int, int]:
    """The edges that a picture is resized to. Raises BadRequest where nothing is left."""
    if height < space.ratio or width < space.ratio:
        raise BadRequest(
            f"The picture is {width} x {height} pixels; {space.class_name} takes at least {space.ratio} x {space.ratio}",
            parameter="image",
        )
    return height - height % space.ratio, width - width % space.ratio


def open_picture(file: Picture, alpha: bool = False) -> Image.Image:
    """The picture in a file, upright, RGB; RGBA with `alpha`.

    Raises:
        BadRequest: no PNG, JPEG or WebP, too many pixels, or broken.
    """
    try:
        picture = Image.open(io.BytesIO(file.data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRequest(f"The picture is too large: {error}", parameter="image") from error
    except Exception as error:  # on hostile bytes Pillow raises what it pleases
        raise BadRequest(
            "The body is no PNG, JPEG or WebP; for pixels send shape and dtype", parameter="image"
        ) from error
    if picture.width * picture.height > MAX_PIXELS:
        raise BadRequest(
            f"The picture is {picture.width} x {picture.height} pixels; at most {MAX_PIXELS} are taken",
            parameter="image",
        )
    try:
        ImageOps.exif_transpose(picture, in_place=True)
        return in_rgba(picture) if alpha else in_rgb(picture)
    except Exception as error:
        raise BadRequest(
            f"The picture cannot be read to its end ({type(error).__name__})", parameter="image"
        ) from error
