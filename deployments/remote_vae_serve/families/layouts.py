"""`Layout`: an order of the axes of latents, packed or not, and how it is unpacked to what a decoder takes; and `RequestHints`.

Torch is used on tensors handed in; channels are on axis 1 of what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from remote_vae.errors import BadRequest
from remote_vae.protocol.hints import Hints
from remote_vae_serve.families.latent_numbers import LatentNumbers

Media = Literal["image", "video"]
Kind = Literal["channels_first", "channels_last", "frames_first"]


@dataclass(frozen=True)
class RequestHints(Hints):
    """The hints of one request, the application's where it leaves one out, and its `height` and `width` in pixels."""

    height: int | None = None
    width: int | None = None

    @classmethod
    def merged(cls, hints: Hints, height: int | None = None, width: int | None = None) -> RequestHints:
        """`hints` with the size of the picture, in pixels, where the request gives it."""
        return cls(**hints.to_plain(), height=height, width=width)  # type: ignore[arg-type]  # each is of its own field


NO_HINTS = RequestHints()
Fits = Callable[[torch.Tensor, LatentNumbers, RequestHints], bool]
Unpack = Callable[[torch.Tensor, LatentNumbers, RequestHints], torch.Tensor]
Repack = Callable[[torch.Tensor, tuple[int, ...], RequestHints], torch.Tensor]


def _as_it_is(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    return latents


@dataclass(frozen=True)
class Layout:
    """A memory layout of a family's latents: which it is, and how to unpack it.

    Attributes:
        expects: how to say it to a user, with the family's numbers filled in by `str.format`.
        media: what comes out.
        fits: whether these latents have this form.
        unpack: to what the decoder takes, `[B, C, h, w]` or `[B, C, T, h, w]`. Raises BadRequest.
        repack: the decoder's output to `[B, C, H, W]` or `[B, C, T, H, W]`, given the latents' shape; None where
            it has that form.
        kind: which axis has the channels; a request can ask for it by `layout`.
        takes: the hints that mean something to it.
    """

    expects: str
    media: Media
    fits: Fits
    unpack: Unpack = _as_it_is
    repack: Repack | None = None
    kind: Kind = "channels_first"
    takes: tuple[str, ...] = ()


def _fold_frames(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    batch, channels, frames, height, width = latents.shape
    return latents.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)


def _unfold_frames(pixels: torch.Tensor, shape: tuple[int, ...], hints: RequestHints) -> torch.Tensor:
    return pixels.reshape(shape[0], shape[2], *pixels.shape[1:]).transpose(1, 2)


def without_time(pixels: torch.Tensor, shape: tuple[int, ...], hints: RequestHints) -> torch.Tensor:
    """Drop the time axis of one frame: `[B, C, 1, H, W]` to `[B, C, H, W]`."""
    return pixels[:, :, 0]


def _is_one_image(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> bool:
    """`[C, h, w]` without a size, or with its own: SD.Next sends both, for Flux and HiDream. Packed latents of that size have
    another number of tokens, so that nothing is both."""
    if latents.ndim != 3 or latents.shape[0] != space.channels:
        return False
    edges = ((hints.height, latents.shape[1]), (hints.width, latents.shape[2]))
    return all(pixels is None or pixels // space.ratio == edge for pixels, edge in edges)


def has_axes(count: int, channels_on: int) -> Fits:
    """Latents fit that have `count` axes and the model's channels on axis `channels_on`."""

    def fits(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> bool:
        return latents.ndim == count and latents.shape[channels_on] == space.channels

    return fits


def _is_last(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> bool:
    """Whether five axes end with the channels; where axis 1 has as many, only if the hint `layout` says so."""
    last = latents.ndim == 5 and latents.shape[-1] == space.channels
    return last and (hints.layout == "channels_last" or latents.shape[1] != space.channels)


IMAGES = Layout("[B, {channels}, h, w]", "image", has_axes(4, 1))
ONE_IMAGE = Layout("[{channels}, h, w]", "image", _is_one_image, lambda z, space, hints: z[None])
VIDEO = Layout("[B, {channels}, T, h, w]", "video", has_axes(5, 1))
FOLDED = Layout(
    "[B, {channels}, T, h, w], decoded frame by frame", "video", has_axes(5, 1), _fold_frames, _unfold_frames
)
FRAMES_FIRST = Layout(
    "[B, T, {channels}, h, w]",
    "video",
    has_axes(5, 2),
    lambda z, space, hints: z.permute(0, 2, 1, 3, 4),
    kind="frames_first",
)
CHANNELS_LAST = Layout(
    "[B, T, h, w, {channels}]",
    "video",
    _is_last,
    lambda z, space, hints: z.permute(0, 4, 1, 2, 3),
    kind="channels_last",
    takes=("layout",),
)
IMAGE_CHANNELS_LAST = Layout(
    "[B, 1, h, w, {channels}]",
    "image",
    lambda z, space, hints: _is_last(z, space, hints) and z.shape[1] == 1,
    lambda z, space, hints: z[:, 0].permute(0, 3, 1, 2),
    kind="channels_last",
    takes=("layout",),
)
ONE_FRAME = Layout(
    "[B, {channels}, 1, h, w]",
    "image",
    lambda z, space, hints: has_axes(5, 1)(z, space, hints) and z.shape[2] == 1,
    repack=without_time,
)
IMAGES_AS_FRAMES = Layout(
    "[B, {channels}, h, w]", "image", has_axes(4, 1), lambda z, space, hints: z[:, :, None], without_time
)
PATCHES = Layout(
    "patches [B, {patched}, h, w]",
    "image",
    lambda z, space, hints: z.ndim == 4 and z.shape[1] == 4 * space.channels,
    lambda z, space, hints: from_patches(z),
)


def drop_frames(latents: torch.Tensor, hints: RequestHints) -> torch.Tensor:
    """A video's latents `[B, C, T, h, w]` without the leading frames that the hint says are none of the video.

    Raises:
        BadRequest: nothing would be left.
    """
    count = hints.drop_frames
    if not count or latents.ndim != 5:
        return latents
    if count >= latents.shape[2]:
        raise BadRequest(
            f"drop_frames is {count}, and the latents have {latents.shape[2]} frames", parameter="drop_frames"
        )
    return latents[:, :, count:]


def unfold_frames(latents: torch.Tensor, frames: int | None) -> torch.Tensor:
    """Latents of frames that were encoded as images, `[B * T, C, h, w]`, as those of videos of so many frames, `[B, C, T, h, w]`;
    as they are for None."""
    return latents if frames is None else latents.reshape(-1, frames, *latents.shape[1:]).transpose(1, 2)


def channels_last(latents: torch.Tensor) -> torch.Tensor:
    """Permute latents to channels last: `[B, C, h, w]`, whose T is 1, or `[B, C, T, h, w]` to `[B, T, h, w, C]`; a view."""
    return (latents if latents.ndim == 5 else latents[:, :, None]).permute(0, 2, 3, 4, 1)


def to_patches(latents: torch.Tensor) -> torch.Tensor:
    """Patchify latents (space to depth): `[B, C, h, w]` to `[B, 4C, h/2, w/2]`, each 2 x 2 patch in the order (c, ph, pw); h
    and w are even."""
    batch, channels, height, width = latents.shape
    split = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(batch, 4 * channels, height // 2, width // 2)


def from_patches(latents: torch.Tensor) -> torch.Tensor:
    """Unpatchify latents (depth to space): `[B, 4C, h, w]` to `[B, C, 2h, 2w]`, the inverse of `to_patches`."""
    batch, channels, height, width = latents.shape
    split = latents.reshape(batch, channels // 4, 2, 2, height, width)
    return split.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, 2 * height, 2 * width)


def _unshuffle(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """Unshuffle time from channels, `[B, 2C, F, h, w]` to `[B, C, 2F - 1, h, w]`: the first frame is there twice."""
    batch, _, frames, height, width = latents.shape
    split = latents.permute(0, 2, 1, 3, 4).reshape(batch, 2 * frames, space.channels, height, width)
    return split.permute(0, 2, 1, 3, 4)[:, :, 1:]


def shuffle(latents: torch.Tensor) -> torch.Tensor:
    """Shuffle time into channels, `[B, C, 2F - 1, h, w]` to `[B, 2C, F, h, w]`, the inverse of unshuffling."""
    twice = torch.cat((latents[:, :, :1], latents), dim=2)
    batch, channels, frames, height, width = twice.shape
    folded = twice.permute(0, 2, 1, 3, 4).reshape(batch, frames // 2, 2 * channels, height, width)
    return folded.permute(0, 2, 1, 3, 4)


SHUFFLED = Layout(
    "[B, {doubled}, 1, h, w]",
    "image",
    lambda z, space, hints: z.ndim == 5 and z.shape[1] == 2 * space.channels and z.shape[2] == 1,
    _unshuffle,
    without_time,
)


def _unpack_tokens_of_a_square(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    side = math.isqrt(latents.shape[1])
    if side * side != latents.shape[1]:
        raise BadRequest(
            f"The latents of this {space.class_name} have {latents.shape[1]} tokens, which make no square",
            parameter="shape",
        )
    return latents


SQUARE_TOKENS = Layout(
    "[B, N, {channels}]",
    "image",
    lambda z, space, hints: z.ndim == 3 and z.shape[2] == space.channels,
    _unpack_tokens_of_a_square,
)
