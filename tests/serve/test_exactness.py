"""Through either door, every output equals what diffusers does locally with the same weights: bit for bit, since both
sides run one thread and the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from ray import serve

from reading import psnr, read
from remote_vae import RemoteVAE
from remote_vae_serve.codecs.mp4 import to_mp4
from running_cluster import SERVED, Cluster
from samples import IMAGE_KINDS, latents, pipeline_decode, postprocessed, samples_of, tiny_vae

CASES = [(kind, layout) for kind in SERVED for layout in samples_of(kind)]


@pytest.fixture(params=["http", "handle"])
def door(request: pytest.FixtureRequest, cluster: Cluster) -> Any:
    """Opens a model through this door."""
    opened: list[RemoteVAE] = []

    def open_model(kind: str) -> RemoteVAE:
        endpoint = f"{cluster.url}/{kind}" if request.param == "http" else serve.get_app_handle(kind)
        opened.append(RemoteVAE(endpoint))
        return opened[-1]

    yield open_model
    for vae in opened:
        vae.close()


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_every_output_equals_the_local_pipeline(door: Any, kind: str, layout: str) -> None:
    z, sizes = samples_of(kind)[layout]
    expected = pipeline_decode(tiny_vae(kind), z, **sizes)
    frames = expected[0].transpose(0, 1) if expected.ndim == 5 else expected
    exact_uint8 = np.stack([np.asarray(image) for image in postprocessed(frames, "pil")])
    vae = door(kind)

    pt = vae.decode(z, output_type="pt", **sizes)
    assert pt.dtype == torch.float32
    assert torch.equal(pt, expected)

    uint8 = vae.decode(z, output_type="pt", return_type="pt", partial_postprocess=True, **sizes)
    np.testing.assert_array_equal(uint8.numpy(), exact_uint8)
    images = vae.decode(z, output_type="pt", partial_postprocess=True, **sizes)
    np.testing.assert_array_equal(np.stack(images if isinstance(images, list) else [images]), exact_uint8)

    unit = vae.decode(z, VaeImageProcessor(), return_type="pt", **sizes)
    assert torch.equal(unit, postprocessed(frames, "pt"))
    processed = vae.decode(z, VaeImageProcessor(), **sizes)
    np.testing.assert_array_equal(np.stack(processed), exact_uint8)

    if expected.ndim == 4:
        png = vae.decode(z, image_format="png", **sizes)
        np.testing.assert_array_equal(np.asarray(png), exact_uint8[0])
        jpg = vae.decode(z, **sizes)
        assert (jpg.format, jpg.size) == ("jpeg", png.size)
        assert np.abs(np.asarray(jpg, float) - exact_uint8[0]).mean() < 20  # random pixels are the worst case of JPEG
        remade = vae.decode(z, VaeImageProcessor(), output_type="pt", **sizes)
        np.testing.assert_array_equal(np.asarray(remade), exact_uint8[0])


@pytest.mark.parametrize("kind", [kind for kind in SERVED if kind in IMAGE_KINDS])
def test_scaling_is_the_servers_the_clients_or_none(door: Any, kind: str) -> None:
    z, _ = samples_of(kind)["images"]
    local = tiny_vae(kind)
    vae = door(kind)
    with torch.inference_mode():
        ready = local.decode(z).sample
        given = local.decode(z / 0.7 + 0.2).sample
        factor_only = local.decode(z / 0.7).sample
    assert torch.equal(vae.decode(z, do_scaling=False, output_type="pt"), ready)
    assert torch.equal(vae.decode(z, scaling_factor=0.7, shift_factor=0.2, output_type="pt"), given)
    assert torch.equal(vae.decode(z, scaling_factor=0.7, output_type="pt"), factor_only)


def test_a_batch_is_a_list_of_images_and_one_tensor(door: Any) -> None:
    z, _ = samples_of("sd", batch=3)["images"]
    vae = door("sd")
    images = vae.decode(z, image_format="png")
    one_by_one = [pipeline_decode(tiny_vae("sd"), sample[None]) for sample in z]
    assert len(images) == 3
    for image, pixels in zip(images, one_by_one, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(postprocessed(pixels, "pil")[0]))
    assert torch.equal(vae.decode(z, output_type="pt"), pipeline_decode(tiny_vae("sd"), z))


def test_numpy_latents_come_back_as_numpy(door: Any) -> None:
    z, _ = samples_of("sd")["images"]
    pixels = door("sd").decode(z.numpy(), output_type="pt")
    assert isinstance(pixels, np.ndarray)
    np.testing.assert_array_equal(pixels, pipeline_decode(tiny_vae("sd"), z).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_scaled_in_the_decoders_precision(door: Any, dtype: torch.dtype) -> None:
    z = latents(1, 4, 8, 8).to(dtype)
    expected = pipeline_decode(tiny_vae("sdxl"), z.float())
    assert torch.equal(door("sdxl").decode(z, output_type="pt"), expected)


def test_base64_both_ways_changes_nothing(door: Any) -> None:
    z, sizes = samples_of("flux")["packed"]
    vae = door("flux")
    plain = vae.decode(z, output_type="pt", **sizes)
    encoded = vae.decode(z, output_type="pt", input_tensor_type="base64", output_tensor_type="base64", **sizes)
    assert torch.equal(plain, encoded)
    image = vae.decode(z, image_format="png", input_tensor_type="base64", **sizes)
    assert isinstance(image, Image.Image)


def test_a_video_comes_as_an_mp4_whose_frames_are_the_pipelines(door: Any, tmp_path: Path) -> None:
    z, _ = samples_of("hunyuan")["video"]
    pixels = pipeline_decode(tiny_vae("hunyuan"), z)
    frames = np.stack([np.asarray(image) for image in postprocessed(pixels[0].transpose(0, 1), "pil")])
    mp4 = door("hunyuan").decode(z, output_type="mp4")
    shown = read(mp4, tmp_path)
    assert shown.fps == 24
    assert shown.frames.shape == frames.shape
    direct = read(to_mp4([torch.from_numpy(frames)], frames.shape, 24), tmp_path)
    np.testing.assert_array_equal(shown.frames, direct.frames)
    assert psnr(shown.frames, frames) > 15  # random weights make noise, which 4:2:0 cannot hold
    assert read(door("hunyuan").decode(z, output_type="mp4", fps=10), tmp_path).fps == 10


def test_a_video_processor_makes_the_frames_diffusers_would(door: Any) -> None:
    z, _ = samples_of("hunyuan")["video"]
    processor = VideoProcessor(vae_scale_factor=8)
    expected = processor.postprocess_video(pipeline_decode(tiny_vae("hunyuan"), z), output_type="pil")[0]
    vae = door("hunyuan")
    for options in ({}, {"output_type": "pt"}):
        frames = vae.decode(z, processor, **options)
        np.testing.assert_array_equal(np.stack(frames), np.stack(expected))
