"""Write a JPEG of uint8 pixels, by libjpeg-turbo. Bytes in memory only."""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch

from remote_vae_serve.codecs.alpha import over_white

JPEG_QUALITY = 90


def to_jpeg(pixels: torch.Tensor) -> bytes:
    """A JPEG of uint8 pixels `[H, W, 3]`, or `[H, W, 4]` over white, with the GIL let go (Pillow holds it: two threads were
    slower than one)."""
    rgb: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = over_white(pixels).numpy()
    # Not the binding's default of 4:4:4; half the colour is what Pillow, and with it every server of the protocol, writes.
    return bytes(simplejpeg.encode_jpeg(rgb, JPEG_QUALITY, "RGB", "420", fastdct=False))
