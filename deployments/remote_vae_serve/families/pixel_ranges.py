"""`PixelRange`: the value range of a decoder's pixels, which number is black and which is white. All but a few have [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Map = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PixelRange:
    """The value range of an autoencoder's pixels `[B, 3, (T,) H, W]`, in both directions.

    Attributes:
        words: for people.
        to_signed: the decoder's pixels to those in [-1, 1], before anything is clamped; None where they are.
        from_signed: pixels in [-1, 1] to what the encoder takes; None where it takes them.
        scale, shift: the same as numbers, for who is told of them: `pixel * scale + shift` is in [-1, 1]. One for all channels,
            or one for each.
    """

    words: str
    to_signed: Map | None = None
    from_signed: Map | None = None
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)


def _of_images(values: tuple[float, float, float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, 3, *[1] * (like.ndim - 2))


# The means and deviations of ImageNet, as torchvision and every model trained on it have them.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _from_imagenet(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (_of_images(values, pixels) for values in IMAGENET)
    return 2 * (pixels * std + mean) - 1


def _to_imagenet(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (_of_images(values, pixels) for values in IMAGENET)
    return (pixels * 0.5 + 0.5 - mean) / std


SIGNED = PixelRange("[-1, 1]")
UNIT = PixelRange("[0, 1]", lambda pixels: 2 * pixels - 1, lambda pixels: pixels * 0.5 + 0.5, (2.0,), (-1.0,))
NORMED = PixelRange(
    "ImageNet's mean and deviation",
    _from_imagenet,
    _to_imagenet,
    tuple(2 * std for std in IMAGENET[1]),
    tuple(2 * mean - 1 for mean in IMAGENET[0]),
)
# Trained on `byte / 128 - 1` where others have `byte / 127.5 - 1` (Kandinsky6SRPipeline.encode_video and decode_latents).
BYTES_BY_128 = PixelRange(
    "bytes / 128 - 1",
    lambda pixels: (pixels + 1) * (128 / 127.5) - 1,
    lambda pixels: (pixels + 1) * (127.5 / 128) - 1,
    (128 / 127.5,),
    (128 / 127.5 - 1,),
)
