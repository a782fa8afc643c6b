"""Our PNGs are PNGs: read back by Pillow and by ffmpeg's decoder, their pixels are what was written."""

from __future__ import annotations

import io
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from remote_vae_serve.codecs.png import to_png

SIZES = [(1, 1), (1, 7), (7, 1), (8, 8), (31, 33), (64, 96), (720, 3)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("picture", ["noise", "flat", "slope"])
def test_the_pixels_come_back(height: int, width: int, picture: str) -> None:
    rows, columns = np.mgrid[:height, :width]
    pixels = {
        "noise": noise(height, width),
        "flat": np.full((height, width, 3), 255, np.uint8),
        "slope": np.stack([rows, columns, rows + columns], -1).astype(np.uint8),
    }[picture]
    with Image.open(io.BytesIO(to_png(pixels))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_alpha_comes_back_too(height: int, width: int) -> None:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 4), np.uint8)
    with Image.open(io.BytesIO(to_png(pixels))) as image:
        assert (image.format, image.mode) == ("PNG", "RGBA")
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_another_decoder_reads_it_too() -> None:
    pixels = noise(24, 40)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "png_pipe", "-i", "pipe:0",
               "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]  # fmt: skip
    decoded = subprocess.run(command, input=to_png(pixels), capture_output=True, check=True).stdout
    assert decoded == pixels.tobytes()


def test_every_chunk_has_its_length_and_its_checksum() -> None:
    file, chunks = to_png(noise(5, 9)), []
    position = 8
    while position < len(file):
        length = int.from_bytes(file[position : position + 4], "big")
        kind, data = file[position + 4 : position + 8], file[position + 8 : position + 8 + length]
        assert int.from_bytes(file[position + 8 + length : position + 12 + length], "big") == zlib.crc32(kind + data)
        chunks.append(kind)
        position += 12 + length
    assert chunks == [b"IHDR", b"IDAT", b"IEND"]


def test_pixels_that_lie_scattered_in_memory_are_written_too() -> None:
    wide = noise(16, 32)
    with Image.open(io.BytesIO(to_png(wide[:, ::2]))) as image:
        np.testing.assert_array_equal(np.asarray(image), wide[:, ::2])
