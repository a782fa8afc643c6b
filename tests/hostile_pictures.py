"""Pictures and the files of them: honest, odd and hostile."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def preprocessed(*images: Image.Image) -> torch.Tensor:
    return VaeImageProcessor(vae_scale_factor=8).preprocess(list(images))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int, mode: int = 2, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG of a few bytes that says it is as large as that."""
    head = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    data = zlib.compress(rows or b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def webp_claiming(width: int, height: int) -> bytes:
    """An animated WebP of one frame of 16 x 16 on a canvas of that size."""
    frame = b"\0" * 6 + (15).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0"
    frame += file_of(noise(16, 16), "WEBP", lossless=True)[12:]
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    parts = [(b"VP8X", b"\x02\0\0\0" + size), (b"ANIM", b"\0" * 6), (b"ANMF", frame)]
    body = b"WEBP" + b"".join(name + len(data).to_bytes(4, "little") + data for name, data in parts)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def text_bomb() -> bytes:
    """A compressed comment of 100 MB in a PNG of one kilobyte or so."""
    return png_claiming(8, 8, extra=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 10**8)))


PNG, JPEG, WEBP = (file_of(noise(64, 48), kind) for kind in ("PNG", "JPEG", "WEBP"))
HOSTILE: dict[str, bytes] = {
    "one byte": b"\x89",
    "text": b"hello, server",
    "html": b"<html><body>picture</body></html>",
    "zeros": bytes(1000),
    "magic of png alone": b"\x89PNG\r\n\x1a\n",
    "magic of jpeg alone": b"\xff\xd8\xff",
    "magic of webp alone": b"RIFF\x00\x00\x00\x00WEBP",
    "png of a wrong magic": b"\x88" + PNG[1:],
    "jpeg of a wrong magic": b"\xff\xd9" + JPEG[2:],
    "png without its end": PNG[: len(PNG) // 2],
    "png of its head": PNG[:40],
    "jpeg without its end": JPEG[: len(JPEG) // 2],
    "webp without its end": WEBP[: len(WEBP) // 2],
    "png of a wrong checksum": PNG[:29] + b"\0\0\0\0" + PNG[33:],
    "png with a broken stream": PNG[:60] + bytes(200) + PNG[260:],
    "png without pixels": png_claiming(64, 64, rows=b"\0"),
    "png of no width": png_claiming(0, 8),
    "png of a negative width": png_claiming(2**32 - 8, 8),
    "gif": file_of(noise(16, 16), "GIF"),
    "bmp": file_of(noise(16, 16), "BMP"),
    "tiff": file_of(noise(16, 16), "TIFF"),
    "ppm": file_of(noise(16, 16), "PPM"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "text bomb": text_bomb(),
    "bomb of png": png_claiming(50_000, 50_000),
    "bomb of png within Pillow's own limit": png_claiming(8193, 8192),
    "bomb of webp": webp_claiming(16383, 16383),
    "bomb of webp within Pillow's own limit": webp_claiming(8200, 8200),
    "1 x 1": file_of(noise(1, 1)),
    "7 x 64": file_of(noise(7, 64)),
    "64 x 7": file_of(noise(64, 7), "JPEG"),
}
