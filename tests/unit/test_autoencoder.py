"""`RemoteVAE.as_autoencoder()` in diffusers' own pipelines, over HTTP to real replicas of tiny models in this process: the
pixels are those that the same pipeline makes with the same VAE in its own memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from remote_vae import RemoteVAE
from remote_vae.autoencoder.remote_autoencoder import RemoteAutoencoder
from remote_vae.errors import BadRequest, BrokenReply, ConnectionFailed, ModelFailed, Overloaded, UnknownModel
from remote_vae.protocol.model_description import ModelDescription
from replica_server import HALF, Server, folder, half_vae, in_rows, pixels_of, running, server
from samples import KINDS, latents, tiny_vae
from tiny_pipelines import IMAGE_TO_IMAGE, TEXT_TO_IMAGE, arguments, output, pipeline

__all__ = ["folder", "running", "server"]  # fixtures

CASES = [(kind, False) for kind in TEXT_TO_IMAGE] + [(kind, True) for kind in IMAGE_TO_IMAGE]


@pytest.mark.parametrize(("kind", "image_to_image"), CASES)
def test_a_pipeline_makes_the_bits_that_it_makes_with_a_local_vae(
    server: Server, tmp_path: Path, kind: str, image_to_image: bool
) -> None:
    def pixels(vae: Any) -> torch.Tensor:
        batch = 1 if kind == "hunyuan" else 2
        return pixels_of(pipeline(kind, vae, tmp_path, image_to_image), kind, image_to_image, batch)

    remote = pixels(server.vae(kind))
    assert server.models.asked == ["describe", *["encode"] * image_to_image, "decode"]
    assert torch.equal(remote, pixels(in_rows(tiny_vae(kind))))
    torch.testing.assert_close(remote, pixels(tiny_vae(kind)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", IMAGE_TO_IMAGE)
def test_each_image_of_a_batch_is_sampled_with_its_own_generator(server: Server, tmp_path: Path, kind: str) -> None:
    def pixels(vae: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        return pixels_of(pipeline(kind, vae, tmp_path, True), kind, True, 2, generator=generators)

    assert torch.equal(pixels(server.vae(kind)), pixels(in_rows(tiny_vae(kind))))


@pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning")  # diffusers calls what it deprecates
@pytest.mark.parametrize("image_to_image", [False, True])
def test_sdxl_in_float16_upcasts_it_and_makes_the_same_bits(
    server: Server, tmp_path: Path, image_to_image: bool
) -> None:
    def pixels(vae: Any) -> torch.Tensor:
        pipe = pipeline("sdxl", vae, tmp_path, image_to_image).to(torch.float16)
        halves = {
            name: value.half() if isinstance(value, torch.Tensor) and name != "image" else value
            for name, value in arguments("sdxl", image_to_image).items()
        }
        pixels = output(pipe(**halves))
        assert vae.dtype == torch.float16  # set back
        return pixels

    remote, local = pixels(server.vae(HALF)), pixels(in_rows(half_vae()))
    assert remote.dtype == local.dtype
    assert torch.equal(remote, local)


@pytest.mark.parametrize("way", ["constructor", "assignment", "from_pretrained"])
def test_there_are_three_ways_into_a_pipeline(server: Server, folder: Path, way: str) -> None:
    vae = server.vae("sd")
    if way == "constructor":
        pipe = pipeline("sd", vae, folder / "words")
    elif way == "assignment":
        pipe = StableDiffusionPipeline.from_pretrained(folder / "sd", vae=None)
        pipe.vae = vae
    else:
        pipe = StableDiffusionPipeline.from_pretrained(folder / "sd", vae=vae)
    pipe.set_progress_bar_config(disable=True)
    expected = pixels_of(pipeline("sd", tiny_vae("sd"), folder / "words"), "sd")
    assert torch.equal(pixels_of(pipe, "sd"), expected)


def test_a_prompt_becomes_a_picture(server: Server, folder: Path) -> None:
    pipe = pipeline("sd", server.vae("sd"), folder / "words")
    picture = pipe("a cat", num_inference_steps=2, height=32, width=48).images[0]
    assert (picture.mode, picture.size) == ("RGB", (48, 32))


def test_it_goes_on_to_another_pipeline(server: Server, folder: Path) -> None:
    pipe = pipeline("sd", server.vae("sd"), folder / "words")
    expected = pixels_of(pipeline("sd", in_rows(tiny_vae("sd")), folder / "words", True), "sd", True)
    for other in (
        AutoPipelineForImage2Image.from_pipe(pipe),
        StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae),
    ):
        assert other.vae is pipe.vae
        other.set_progress_bar_config(disable=True)
        assert torch.equal(pixels_of(other, "sd", True), expected)


def test_its_device_and_dtype_are_where_the_pipeline_was_sent(server: Server, folder: Path) -> None:
    vae = server.vae("sd")
    pipe = pipeline("sd", vae, folder / "words")
    assert (vae.device, vae.dtype) == (torch.device("cpu"), torch.float32)
    assert pipe.to("cpu", torch.bfloat16).vae is vae
    assert vae.dtype == next(vae.post_quant_conv.parameters()).dtype == next(vae.parameters()).dtype == torch.bfloat16
    assert vae.to("meta").device == torch.device("meta")
    assert vae.num_parameters() == 0
    assert server.models.asked == ["describe"]


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_leaves_the_pixels_alone(server: Server, folder: Path, offload: str) -> None:
    expected = pixels_of(pipeline("sd", tiny_vae("sd"), folder / "words"), "sd")
    pipe = pipeline("sd", server.vae("sd"), folder / "words")
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(pixels_of(pipe, "sd"), expected)


def test_an_encode_or_decode_loads_it_as_model_offloading_wants(server: Server) -> None:
    """That is when accelerate takes the denoiser off the GPU."""
    vae, loaded = server.vae("sd"), []
    vae._hf_hook = SimpleNamespace(pre_forward=loaded.append)
    vae.decode(latents(1, 4, 2, 2))
    vae.encode(torch.zeros(1, 3, 16, 16))
    assert loaded == [vae, vae]


def test_tiling_and_slicing_can_be_switched_and_change_nothing(server: Server) -> None:
    vae, z = server.vae("sd"), latents(2, 4, 4, 6)
    expected = vae.decode(z).sample
    vae.enable_tiling(tile_sample_min_height=16)
    vae.enable_slicing()
    assert torch.equal(vae.decode(z).sample, expected)
    vae.disable_tiling()
    vae.disable_slicing()


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_is_the_local_vaes(server: Server, kind: str) -> None:
    vae, local = server.vae(kind), tiny_vae(kind)
    z = latents(1, local.config.latent_channels, *([2] if kind == "hunyuan" else []), 4, 6)
    with torch.no_grad():
        expected = local.decode(z)
    assert type(vae.decode(z)) is type(expected)
    assert torch.equal(vae.decode(z).sample, expected.sample)
    (pixels,) = vae.decode(z, return_dict=False)
    assert torch.equal(pixels, expected.sample)
    assert vae.decode(z.bfloat16()).sample.dtype == torch.bfloat16
    assert server.models.asked == ["describe", *["decode"] * 4]


def test_it_is_called_as_its_class_is(server: Server) -> None:
    z = latents(1, 4, 2, 2)
    vae = server.vae("sd")
    assert torch.equal(vae.decode(z, False, generator=torch.Generator())[0], vae.decode(z=z)["sample"])
    assert torch.equal(server.vae("tiny").decode(z, torch.Generator(), False)[0], server.vae("tiny").decode(x=z).sample)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temb'"):
        vae.decode(z, temb=None)
    with pytest.raises(BadRequest, match="no forward pass"):
        vae(z)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encode_is_the_local_vaes(server: Server, kind: str) -> None:
    vae, local = server.vae(kind), tiny_vae(kind)
    pixels = 1.2 * latents(
        1, 3, *([5] if kind == "hunyuan" else []), 32, 48
    )  # some out of [-1, 1], as pipelines may have
    with torch.no_grad():
        expected = local.encode(pixels)
    given, (alone,) = vae.encode(pixels), vae.encode(pixels, return_dict=False)
    assert type(given) is type(expected)
    if kind == "tiny":
        assert torch.equal(given.latents, expected.latents)
        assert torch.equal(alone, expected.latents)
        assert vae.encode(pixels.bfloat16()).latents.dtype == torch.bfloat16
        return
    seeded = partial(torch.Generator().manual_seed, 7)
    assert type(alone) is type(expected.latent_dist)
    assert torch.equal(alone.parameters, expected.latent_dist.parameters)
    assert torch.equal(given.latent_dist.mode(), expected.latent_dist.mode())
    assert torch.equal(given.latent_dist.sample(seeded()), expected.latent_dist.sample(seeded()))
    assert vae.encode(pixels.bfloat16()).latent_dist.sample().dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_its_config_says_all_that_the_local_ones_says_and_is_fetched_once(server: Server, kind: str) -> None:
    vae, local = server.vae(kind), tiny_vae(kind)
    assert server.models.asked == ["describe"], "at once: a wrong name shows before the sampling"
    for name, value in local.config.items():
        if not name.startswith("_"):
            assert getattr(vae.config, name) == vae.config[name] == (list(value) if isinstance(value, tuple) else value)
    assert not hasattr(vae.config, "no_such_setting")
    assert vae.spatial_compression_ratio == 8
    assert getattr(vae, "temporal_compression_ratio", None) == getattr(local, "temporal_compression_ratio", None)
    assert server.models.asked == ["describe"]


def test_the_config_can_be_changed_here(server: Server) -> None:
    """StableDiffusionUpscalePipeline does so when it is made."""
    vae = server.vae("sd")
    vae.register_to_config(scaling_factor=0.08333)
    assert (vae.config.scaling_factor, vae.config["latent_channels"]) == (0.08333, 4)
    assert server.vae("sd").config.scaling_factor == 0.18215


class Described:
    """A model that only says what it is."""

    def __init__(self, **said: Any) -> None:
        self.said = said

    def description(self, wake: bool = False) -> ModelDescription:
        return ModelDescription.from_plain(self.said)


def test_a_tiny_vae_of_an_old_file_has_the_channels_that_pipelines_count() -> None:
    """madebyollin/taesd's config.json has no block_out_channels; AutoencoderTiny adds them when it is made."""
    vae = RemoteAutoencoder(
        Described(**{"class": "AutoencoderTiny", "config": {"decoder_block_out_channels": [64] * 4}})
    )
    assert vae.config.block_out_channels == [64] * 4


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (
            {"class": "AutoencoderOfNextYear", "config": {}},
            BadRequest,
            r"AutoencoderOfNextYear.*diffusers [\d.]+ here has not",
        ),
        ({"class": "UNet2DModel", "config": {}}, BadRequest, "has not"),
        (
            {"class": "AutoencoderKL", "config": {"block_out_channels": 7}},
            BadRequest,
            "config does not fit AutoencoderKL",
        ),
        ({"class": "AutoencoderKL"}, BrokenReply, "this client's version"),
        ({"config": {}}, BrokenReply, "this client's version"),
        ({"state": "failed", "reason": "no weights"}, ModelFailed, "no weights"),
    ],
)
def test_what_it_cannot_stand_in_for_it_says_at_once(said: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RemoteAutoencoder(Described(**said))


@pytest.mark.parametrize(
    "name", ["bn", "temporal_compression_ratio", "tiled_decode", "tokens_chunk_size", "no_such_thing", "_decode"]
)
def test_what_it_does_not_have_it_says_with_what_to_do(server: Server, name: str) -> None:
    vae = server.vae("sd")
    assert not hasattr(vae, name)
    with pytest.raises(
        AttributeError, match=rf"^RemoteAutoencoder has no '{name}'.* Keep a local VAE for this pipeline"
    ):
        getattr(vae, name)


def test_errors_of_the_server_come_out_of_the_pipeline(server: Server, folder: Path) -> None:
    pipe = pipeline("sd", server.vae("sd"), folder / "words", image_to_image=True)
    server.models.error = Overloaded("The queue is full", retry_after=1)
    with pytest.raises(Overloaded, match="The queue is full"):
        pipe(**arguments("sd", image_to_image=True))
    server.models.error = None
    pixels_of(pipe, "sd", image_to_image=True)


def test_errors_of_the_server_come_out_before_there_is_a_pipeline(server: Server) -> None:
    with pytest.raises(UnknownModel, match=r"served: \["):
        server.vae("nobody")
    with pytest.raises(ModelFailed, match=r"config\.json"):
        server.vae("failed")
    with pytest.raises(ConnectionFailed):
        RemoteVAE("http://127.0.0.1:9/sd", retries=0).as_autoencoder()


def test_a_model_without_an_encoder_says_so() -> None:
    vae = RemoteAutoencoder(Described(**{"class": "AutoencoderKL", "config": {}, "encode": None}))
    with pytest.raises(BadRequest, match=r"no encoder.*keep a local VAE"):
        vae.encode(torch.zeros(1, 3, 16, 16))


def test_gradients_are_refused_where_they_would_be_lost(server: Server) -> None:
    vae, z = server.vae("sd"), latents(1, 4, 2, 2).requires_grad_()
    for call in (vae.decode, vae.encode):
        with pytest.raises(BadRequest, match="No gradients"):
            call(z)
    with torch.no_grad():
        assert vae.decode(z).sample.shape == (1, 3, 16, 16)


def test_it_cannot_be_saved(server: Server, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"no weights to save; set pipe\.vae"):
        server.vae("sd").save_pretrained(tmp_path)
