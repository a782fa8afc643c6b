"""Pictures with alpha, of the families that make and take them: Qwen-Image-Layered and Qwen-Image 2.1."""

from __future__ import annotations

import asyncio
import io
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from families.images import CASES
from in_process import diffusers_engine, pipeline_of
from remote_vae.calls.decode_call import open_image
from remote_vae.errors import BadRequest
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae.protocol.wire import Scaling
from remote_vae_serve.codecs import codecs
from remote_vae_serve.codecs.alpha import over_white
from remote_vae_serve.codecs.host_copy import HostCopy
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from samples import latents, save_tiny_vae

CASE = next(case for case in CASES if "Layered" in case.name)
SIZE = {"height": 32, "width": 48}
COLOURS = np.random.default_rng(5).integers(0, 256, (32, 48, 4), np.uint8)

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> DiffusersEngine:
    folder = tmp_path_factory.mktemp("layered")
    CASE.build().save_pretrained(folder)
    return diffusers_engine(folder)


def decoded(engine: DiffusersEngine, output: Output, layers: int = 1) -> Result:
    """Of as many layers; the first of the packed pictures is none."""
    z = latents(1, 6 * (1 + layers), 64)
    request = DecodeRequest(from_array(z), Scaling(own=True), output, hints=Hints(layers=layers), **SIZE)
    pipeline = pipeline_of(engine)
    try:
        return asyncio.run(pipeline.decode(request))
    finally:
        pipeline.close()


def locally(layers: int = 1) -> torch.Tensor:
    """The decoder's own pixels `[layers, 4, 32, 48]`."""
    z = latents(1, 6 * (1 + layers), 64)
    parts = z.view(1, layers + 1, 2, 3, 16, 2, 2).permute(0, 1, 4, 2, 5, 3, 6).reshape(layers + 1, 16, 1, 4, 6)[1:]
    vae = CASE.build()
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.inference_mode():
        return torch.cat([vae.decode(part[None] / (1.0 / std) + mean).sample[:, :, 0] for part in parts])


def test_a_png_has_the_alpha_that_diffusers_makes_and_the_client_keeps_it(engine: DiffusersEngine) -> None:
    (expected,) = VaeImageProcessor().postprocess(locally(), "pil")
    result = decoded(engine, Output.PNG)
    with Image.open(io.BytesIO(result.data.tobytes())) as image:
        assert (image.format, image.mode) == ("PNG", "RGBA")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    opened = open_image(result)
    assert (opened.mode, opened.format) == ("RGBA", "png")
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(expected))


def test_a_jpeg_lies_on_white(engine: DiffusersEngine) -> None:
    (expected,) = VaeImageProcessor().postprocess(locally(), "pil")
    white = Image.alpha_composite(Image.new("RGBA", expected.size, "white"), expected).convert("RGB")
    composed = over_white(torch.from_numpy(np.array(expected))).numpy()
    np.testing.assert_allclose(composed.astype(int), np.asarray(white).astype(int), atol=1)
    file = io.BytesIO()
    Image.fromarray(composed).save(file, "JPEG", quality=90)
    theirs = np.asarray(Image.open(file)).astype(float)
    ours = open_image(decoded(engine, Output.JPEG))
    assert (ours.mode, ours.size) == ("RGB", (48, 32))
    assert np.abs(np.asarray(ours).astype(float) - theirs).mean() < 2


@pytest.mark.parametrize("alpha", [0, 255])
def test_what_is_clear_is_white_and_what_is_opaque_stays(alpha: int) -> None:
    pixels = torch.from_numpy(COLOURS.copy())
    pixels[..., 3] = alpha
    expected = pixels[..., :3] if alpha else torch.full((32, 48, 3), 255, dtype=torch.uint8)
    assert torch.equal(over_white(pixels), expected)
    assert torch.equal(over_white(pixels[..., :3]), pixels[..., :3])


def test_a_video_lies_on_white() -> None:
    frames = torch.from_numpy(np.stack([COLOURS] * 3)).clone()
    frames[..., 3] = 0
    file = codecs.write(HostCopy(frames), Output.MP4, 8.0).data.tobytes()
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-loglevel",
        "error",
        "-i",
        "pipe:0",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
    ]
    shown = subprocess.run([*command, "pipe:1"], input=file, capture_output=True, check=True).stdout
    assert np.frombuffer(shown, np.uint8).reshape(3, 32, 48, 3).min() >= 250


def test_tensors_keep_four_channels_of_every_layer(engine: DiffusersEngine) -> None:
    pixels = locally(2)
    assert torch.equal(to_torch(decoded(engine, Output.PT, 2).tensor), pixels)
    bytes_of = to_torch(decoded(engine, Output.UINT8, 2).tensor)
    expected = np.stack([np.asarray(image) for image in VaeImageProcessor().postprocess(pixels, "pil")])
    np.testing.assert_array_equal(bytes_of.numpy(), expected)


def test_pictures_and_bytes_are_encoded_with_their_alpha(engine: DiffusersEngine) -> None:
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, "PNG")
    expected = VaeImageProcessor().preprocess(Image.fromarray(COLOURS))
    assert expected.shape[1] == 4
    of_file = engine.processor.preprocess_image(EncodeRequest(np.frombuffer(file.getvalue(), np.uint8)))
    of_bytes = engine.processor.preprocess_image(EncodeRequest(from_array(COLOURS)))
    for prepared in (of_file, of_bytes):
        assert torch.equal(prepared.pixels, expected[:, :, None])


def test_a_picture_without_alpha_is_opaque(engine: DiffusersEngine) -> None:
    palette = Image.fromarray(COLOURS).convert("RGB").quantize(8)
    for picture in (Image.fromarray(COLOURS).convert("RGB"), palette, Image.fromarray(COLOURS).convert("L")):
        file = io.BytesIO()
        picture.save(file, "PNG")
        pixels = engine.processor.preprocess_image(EncodeRequest(np.frombuffer(file.getvalue(), np.uint8))).pixels
        assert pixels.shape == (1, 4, 1, 32, 48)
        assert torch.equal(pixels[:, 3], torch.ones(1, 1, 32, 48))
        assert torch.equal(pixels[:, :3], VaeImageProcessor().preprocess(picture.convert("RGB"))[:, :, None])


def test_alpha_is_refused_by_a_model_that_has_none(tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = diffusers_engine(save_tiny_vae("sd", tmp_path_factory.mktemp("sd")))
    with pytest.raises(BadRequest, match=r"AutoencoderKL takes 3 channels: leave the fourth out") as caught:
        engine.processor.preprocess_image(EncodeRequest(from_array(COLOURS)))
    assert caught.value.parameter == "shape"
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, "PNG")
    prepared = engine.processor.preprocess_image(EncodeRequest(np.frombuffer(file.getvalue(), np.uint8)))
    assert prepared.pixels.shape == (1, 3, 32, 48)
