"""Pictures on their way into an encoder: hostile and odd files, and exactness: what goes in is what diffusers' own
`VaeImageProcessor.preprocess` makes of it, bit for bit. What comes out is in `test_encoded`."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fresh_process import printed_by
from hostile_pictures import (
    HOSTILE,
    JPEG,
    PNG,
    WEBP,
    chunk,
    file_of,
    noise,
    preprocessed,
)
from remote_vae.errors import BadRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.families.table import latent_space_of
from remote_vae_serve.processing import preprocess
from remote_vae_serve.processing.preprocess import MAX_PIXELS, open_picture, prepare
from samples import CONFIGS, HUNYUAN, KL

IMAGES = latent_space_of("AutoencoderKL", {**KL, **CONFIGS["sd"]})
VIDEOS = latent_space_of(
    "AutoencoderKLHunyuanVideo", {**HUNYUAN, "spatial_compression_ratio": 8, "temporal_compression_ratio": 4}
)


def opened(file: bytes) -> Image.Image:
    return open_picture(np.frombuffer(file, np.uint8))


def prepared(image: Any, space: LatentSpace = IMAGES) -> torch.Tensor:
    image = np.frombuffer(image, np.uint8) if isinstance(image, bytes) else from_array(image)
    return prepare(EncodeRequest(image), space).pixels


PEAK = Path("/proc/self/clear_refs")
BOMBS = """
import json, warnings
from pathlib import Path
import numpy as np
from hostile_pictures import png_claiming, text_bomb, webp_claiming
from remote_vae.errors import BadRequest
from remote_vae_serve.processing.preprocess import open_picture
warnings.simplefilter("ignore")
def most_mib():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
def grown_by(file):
    try:
        picture = open_picture(np.frombuffer(file, np.uint8))
    except BadRequest:
        picture = None
    return picture is not None, most_mib() - before
bombs = [png_claiming(50_000, 50_000), png_claiming(16_000, 8_000), webp_claiming(16_383, 16_383), text_bomb()]
assert max(map(len, bombs)) < 200_000
honest = png_claiming(4096, 4096, mode=0, rows=bytes(4097 * 4096))
Path("/proc/self/clear_refs").write_text("5")  # forget how much it was at most
before = most_mib()
print(json.dumps([grown_by(file) for file in [*bombs, honest]]))
"""
"""Whether each picture was opened, and by how many MiB the most that the process ever held had grown after it."""


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_bad_request_that_names_the_image(name: str) -> None:
    with pytest.raises(BadRequest) as caught:
        prepared(HOSTILE[name])
    assert caught.value.parameter == "image"
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("file", [PNG, JPEG, WEBP], ids=["png", "jpeg", "webp"])
def test_no_damage_raises_anything_else(file: bytes) -> None:
    """Pillow's readers raise SyntaxError, struct.error, ValueError, EOFError: what they please."""
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(file)
        for at in random.integers(0, len(file), 4):
            damaged[at] = random.integers(0, 256)
        try:
            image = opened(bytes(damaged[: random.integers(1, len(file) + 1)]))
        except BadRequest:
            continue
        assert image.mode == "RGB"


@pytest.mark.skipif(not PEAK.exists(), reason="Linux alone can forget how much memory a process had at most")
def test_a_bomb_is_refused_before_it_goes_off() -> None:
    """In a process of its own, in which every large block is asked of the system: what earlier work freed hides no growth."""
    told = json.loads(printed_by(BOMBS, environment=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}))
    *bombs, (was_opened, control_mib) = told
    assert [opened for opened, _ in bombs] == [False] * 4
    assert max(mib for _, mib in bombs) < 32
    assert was_opened
    assert control_mib > 48  # 16 MB of grey, 64 of RGB: the measure works


def test_the_limit_is_one_of_pixels_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PIXELS == 8192 * 8192
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 64 * 48)
    assert opened(PNG).size == (64, 48)
    with pytest.raises(BadRequest, match=r"65 x 48 pixels; at most 3072"):
        opened(file_of(noise(65, 48)))


# Odd, and right


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_a_png_of_any_mode_becomes_rgb(mode: str) -> None:
    grey = np.random.default_rng(3).integers(0, 2**16, (16, 24), np.uint16)
    image = Image.fromarray(grey) if mode == "I;16" else noise(24, 16).convert("RGBA").convert(mode)
    rgb = (
        np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, -1)
        if mode == "I;16"
        else np.asarray(image.convert("RGB"))
    )
    assert np.array_equal(np.asarray(opened(file_of(image))), rgb)


def test_16_bits_of_colour_become_8() -> None:
    rows = b"".join(b"\0" + struct.pack(">24H", *range(y, y + 24 * 2700, 2700)) for y in range(8))
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.asarray(opened(png))[0].ravel().tolist() == [n * 2700 >> 8 for n in range(24)]


def test_colours_are_taken_as_they_are_under_alpha() -> None:
    image = noise(16, 16)
    seen = np.asarray(image)
    image.putalpha(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    assert np.array_equal(np.asarray(opened(file_of(image))), seen)
    assert np.array_equal(np.asarray(opened(file_of(image, "WEBP", lossless=True, exact=True))), seen)


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255] * 5)])
def test_transparent_colours_of_a_palette_are_taken_and_nobody_is_warned(transparency: Any) -> None:
    image = noise(16, 16).quantize(16)
    seen = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(opened(file_of(image, transparency=transparency))), seen)


def test_a_cmyk_jpeg_is_converted() -> None:
    file = file_of(noise(24, 16).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(file)).mode == "CMYK"
    assert np.array_equal(np.asarray(opened(file)), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


def test_of_an_animation_the_first_picture_is_taken() -> None:
    first, second = noise(16, 16, 1), noise(16, 16, 2)
    for kind in ("PNG", "WEBP"):
        file = file_of(first, kind, save_all=True, append_images=[second], lossless=True)
        assert np.array_equal(np.asarray(opened(file)), np.asarray(first))


TURNS: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_file_is_taken_as_it_is_to_be_seen(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    file = file_of(noise(24, 16), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    lying = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    assert np.array_equal(np.asarray(opened(file)), TURNS[turn](lying))


def test_a_turned_picture_of_16_bits_is_upright_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.random.default_rng(3).integers(0, 2**16, (16, 24), np.uint16)
    image = opened(file_of(Image.fromarray(grey), exif=exif))
    assert np.array_equal(np.asarray(image)[..., 0], np.rot90(grey >> 8, -1))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_of_no_sense_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(opened(file_of(noise(24, 16), exif=exif))), np.asarray(noise(24, 16)))


# Exactness of what goes in

SIZES = [(8, 8), (64, 48), (65, 48), (71, 55), (9, 200), (15, 15)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "uint8"])
def test_pictures_go_in_as_diffusers_preprocesses_them(kind: str, size: tuple[int, int]) -> None:
    image = noise(*size)
    if kind == "uint8":
        ours = prepared(np.asarray(image))
    else:
        file = file_of(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
        image = Image.open(io.BytesIO(file)).convert("RGB")
        ours = prepared(file)
    theirs = preprocessed(image)
    assert ours.shape == (1, 3, size[1] // 8 * 8, size[0] // 8 * 8)
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride()  # a convolution rounds otherwise for other strides


def test_a_stack_of_uint8_is_a_batch_of_images_or_a_video() -> None:
    images = [noise(43, 30, seed) for seed in range(5)]
    stack = np.stack([np.asarray(image) for image in images])
    assert torch.equal(prepared(stack), preprocessed(*images))
    assert torch.equal(prepared(stack, VIDEOS), preprocessed(*images).transpose(0, 1)[None])
    assert prepared(stack[0], VIDEOS).shape == (1, 3, 1, 24, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "space", "goes_in"),
    [
        ((2, 3, 16, 8), IMAGES, (2, 3, 16, 8)), ((3, 16, 8), IMAGES, (1, 3, 16, 8)),
        ((2, 3, 4, 16, 8), IMAGES, (8, 3, 16, 8)), ((2, 3, 16, 8), VIDEOS, (2, 3, 1, 16, 8)),
        ((3, 16, 8), VIDEOS, (1, 3, 1, 16, 8)), ((1, 3, 5, 16, 8), VIDEOS, (1, 3, 5, 16, 8)),
    ],
)  # fmt: skip
def test_floats_go_in_as_they_are(dtype: torch.dtype, shape: Any, space: LatentSpace, goes_in: Any) -> None:
    floats = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    pixels = prepared(floats, space)
    assert (pixels.shape, pixels.dtype) == (goes_in, dtype)
    if len(shape) == 5 and space is IMAGES:
        floats = floats.transpose(1, 2).flatten(0, 1)
    assert torch.equal(pixels.flatten(), floats.flatten())


@pytest.mark.parametrize(
    ("shape", "space", "reason"),
    [
        ((1, 3, 12, 8), IMAGES, "multiples of 8"), ((1, 3, 8, 12), IMAGES, "multiples of 8"),
        ((1, 3, 1, 1), IMAGES, "multiples of 8"), ((1, 4, 8, 8), IMAGES, "3 channels"), ((1, 8, 8), IMAGES, "3 channels"),
        ((8, 8, 3), IMAGES, "3 channels"), ((1, 8, 8, 3), IMAGES, "3 channels"), ((1, 4, 3, 8, 8), IMAGES, "3 channels"),
        ((1, 3, 4, 8, 8), VIDEOS, "1, 5, 9"), ((1, 3, 5, 8, 7), VIDEOS, "multiples of 8"),
    ],
)  # fmt: skip
def test_floats_that_do_not_fit_are_refused_and_told_what_would(shape: Any, space: LatentSpace, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason) as caught:
        prepared(np.zeros(shape, np.float32), space)
    assert caught.value.parameter == "shape"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_floats_that_are_not_finite_are_refused(value: float) -> None:
    floats = np.zeros((1, 3, 8, 8), np.float32)
    floats[0, 1, 2, 3] = value
    with pytest.raises(BadRequest, match="NaN or infinity"):
        prepared(floats)


@pytest.mark.parametrize("frames", [2, 3, 4, 6, 8])
def test_a_number_of_frames_that_no_video_has_is_refused(frames: int) -> None:
    with pytest.raises(BadRequest, match="1, 5, 9") as caught:
        prepared(np.zeros((frames, 8, 8, 3), np.uint8), VIDEOS)
    assert caught.value.parameter == "shape"
