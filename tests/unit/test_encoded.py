"""What an encode gives is what diffusers' own `vae.encode` gives, bit for bit: through a replica's pipeline and over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

from hostile_pictures import (
    HOSTILE,
    file_of,
    noise,
    preprocessed,
)
from in_process import InProcess, diffusers_engine, pipeline_of
from remote_vae import remote_decode, remote_encode
from remote_vae.errors import BadRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae.protocol.wire import Scaling
from remote_vae_serve.http.app import create_app
from samples import HUNYUAN, IMAGE_KINDS, KINDS, tiny_vae
from served import served


@pytest.fixture(scope="module")
def vaes() -> dict[str, Any]:
    return {kind: tiny_vae(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pipelines(weights: Path) -> Iterator[dict[str, Any]]:
    """A real engine for each kind; and one whose decoder and encoder run in different dtypes."""
    made = {kind: pipeline_of(diffusers_engine(weights / kind), kind) for kind in KINDS}
    made["half"] = pipeline_of(diffusers_engine(weights / "sd", dtype="bfloat16", encode_dtype="float32"))
    yield made
    for pipeline in made.values():
        pipeline.close()


@pytest.fixture(scope="module")
def url(pipelines: dict[str, Any]) -> Iterator[str]:
    models = InProcess(**{kind: pipeline.answer for kind, pipeline in pipelines.items()})
    with served(create_app(models, 1 << 24, 60)) as url:
        yield url


def through_pipeline(pipeline: Any, image: Any, scaling: Scaling, mode: SampleMode, seed: int | None) -> torch.Tensor:
    image = np.frombuffer(image, np.uint8) if isinstance(image, bytes) else from_array(image)
    request = EncodeRequest(image, scaling, mode, seed)
    return to_torch(asyncio.run(pipeline.encode(EncodeRequest.from_plain(request.to_plain()))).tensor)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@torch.inference_mode()
def encoded(vae: Any, pixels: torch.Tensor, mode: str) -> torch.Tensor:
    """diffusers' own."""
    output = vae.encode(pixels)
    if not hasattr(output, "latent_dist"):
        return output.latents
    of = output.latent_dist
    return {"sample": lambda: of.sample(generator()), "argmax": of.mode, "moments": lambda: of.parameters}[mode]()


def modes_of(kind: str) -> tuple[str, ...]:
    return ("sample", "argmax") if kind == "tiny" else ("sample", "argmax", "moments")


FLOATS = torch.rand(2, 3, 16, 24, generator=generator(0)) * 2 - 1
VIDEO = torch.rand(1, 3, 5, 16, 24, generator=generator(1)) * 2 - 1


@pytest.mark.parametrize("mode", ["sample", "argmax", "moments"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out_is_what_diffusers_encodes(
    pipelines: dict[str, Any], url: str, vaes: dict[str, Any], kind: str, mode: str
) -> None:
    if mode not in modes_of(kind):
        for send in (lambda: through_pipeline(pipelines[kind], FLOATS, Scaling(), SampleMode(mode), None),
                     lambda: remote_encode(f"{url}/{kind}", FLOATS, sample_mode=mode)):  # fmt: skip
            with pytest.raises(BadRequest, match="not to a distribution") as caught:
                send()
            assert caught.value.parameter == "sample_mode"
        return
    image, odd = noise(43, 30), [noise(27, 18, seed) for seed in range(5)]
    one, several = preprocessed(image), preprocessed(*odd)
    floats, video = FLOATS, VIDEO
    cases: list[tuple[Any, Any, torch.Tensor]] = [
        (file_of(image), file_of(image), one),
        (np.asarray(image), image, one),
        (np.stack([np.asarray(one) for one in odd]), odd, several),
        (floats, floats, floats),
        (floats[0], floats[0], floats[:1]),
        (video, video, video),
    ]
    for plain, friendly, given in cases:
        pixels, frames = given, None
        if kind == "hunyuan":
            if pixels is several:
                pixels = several.transpose(0, 1)[None]
            elif pixels.ndim == 4:
                pixels = pixels[:, :, None]
        elif pixels.ndim == 5:
            frames = pixels.shape[2]
            pixels = pixels.transpose(1, 2).flatten(0, 1)
        theirs = encoded(vaes[kind], pixels, mode)
        if frames is not None:
            theirs = theirs.unflatten(0, (-1, frames)).transpose(1, 2)
        through = through_pipeline(pipelines[kind], plain, Scaling(), SampleMode(mode), 7)
        over = remote_encode(f"{url}/{kind}", friendly, sample_mode=mode, seed=7)
        assert through.shape == over.shape == theirs.shape
        assert torch.equal(through, theirs)
        assert torch.equal(over, theirs)


def test_moments_can_be_sampled_elsewhere(url: str, vaes: dict[str, Any]) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = remote_encode(f"{url}/sd", FLOATS, sample_mode="moments")
    assert moments.shape == (2, 8, 2, 3)
    sample = DiagonalGaussianDistribution(moments).sample(generator())
    assert torch.equal(sample, remote_encode(f"{url}/sd", FLOATS, seed=7))


def test_without_a_seed_it_is_chance_and_with_one_it_is_not(url: str) -> None:
    samples = [remote_encode(f"{url}/sd", FLOATS) for _ in range(2)]
    assert not torch.equal(*samples)
    seeded = [remote_encode(f"{url}/sd", FLOATS, seed=0) for _ in range(2)]
    assert torch.equal(*seeded)
    assert not torch.equal(seeded[0], remote_encode(f"{url}/sd", FLOATS, seed=1))
    assert not torch.equal(seeded[0], remote_encode(f"{url}/sd", FLOATS, sample_mode="argmax"))


def img2img_latents(kind: str, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the image-to-image pipelines make of the picture, by their own code."""
    if kind in ("sd3", "flux"):  # FluxImg2ImgPipeline._encode_vae_image is the same two lines
        pipeline = object.__new__(StableDiffusion3Img2ImgPipeline)
    else:
        pipeline = object.__new__(
            StableDiffusionXLImg2ImgPipeline if kind == "sdxl" else StableDiffusionImg2ImgPipeline
        )
    scheduler = type("NoNoise", (), {"add_noise": lambda self, z, *_: z, "scale_noise": lambda self, z, *_: z})()
    vars(pipeline).update({"vae": vae, "scheduler": scheduler, "_execution_device": torch.device("cpu")})
    with torch.inference_mode():
        return pipeline.prepare_latents(
            pixels, torch.tensor([1]), len(pixels), 1, torch.float32, torch.device("cpu"), generator()
        )


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_do_scaling_is_the_formula_of_the_image_to_image_pipelines(url: str, vaes: dict[str, Any], kind: str) -> None:
    vae = vaes[kind]
    config = vae.config
    latents = encoded(vae, FLOATS, "sample")
    if getattr(config, "latents_mean", None):  # StableDiffusionXLImg2ImgPipeline.prepare_latents
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (config.latents_mean, config.latents_std))
        expected = (latents - mean) * config.scaling_factor / std
    elif kind in ("sd3", "flux"):
        expected = (latents - config.shift_factor) * config.scaling_factor
    else:
        expected = config.scaling_factor * latents
    ours = remote_encode(f"{url}/{kind}", FLOATS, do_scaling=True, seed=7)
    assert torch.equal(ours, expected)
    assert torch.equal(retrieve_latents(vae.encode(FLOATS), generator()), latents)
    assert torch.equal(ours, img2img_latents(kind, vae, FLOATS))


@pytest.mark.parametrize(("factor", "shift"), [(0.18215, None), (0.3611, 0.1159), (None, 0.25), (2, 0), (-1.5, -0.5)])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux", "tiny", "hunyuan"])
def test_factors_that_were_sent_are_applied_and_nothing_else(
    url: str, vaes: dict[str, Any], kind: str, factor: float | None, shift: float | None
) -> None:
    pixels = VIDEO if kind == "hunyuan" else FLOATS
    latents = encoded(vaes[kind], pixels, "sample")
    expected = (latents - (shift or 0)) * (factor or 1)
    for do_scaling in (False, True):
        ours = remote_encode(f"{url}/{kind}", pixels, factor, shift, seed=7, do_scaling=do_scaling)
        assert torch.equal(ours, expected)


def test_hunyuans_own_scaling_is_its_factor(url: str, vaes: dict[str, Any]) -> None:
    expected = encoded(vaes["hunyuan"], VIDEO, "sample") * HUNYUAN["scaling_factor"]
    assert torch.equal(remote_encode(f"{url}/hunyuan", VIDEO, do_scaling=True, seed=7), expected)


def test_the_encoder_has_a_dtype_of_its_own(pipelines: dict[str, Any], url: str, vaes: dict[str, Any]) -> None:
    assert torch.equal(remote_encode(f"{url}/half", FLOATS, seed=7), encoded(vaes["sd"], FLOATS, "sample"))
    assert remote_decode(f"{url}/half", torch.zeros(1, 4, 2, 2), output_type="pt").dtype == torch.bfloat16
    result = asyncio.run(pipelines["half"].encode(EncodeRequest(from_array(FLOATS))))
    assert result.provenance.dtype == "float32"


def test_half_pixels_on_the_wire_are_the_same_pixels_rounded(url: str, vaes: dict[str, Any]) -> None:
    ours = remote_encode(f"{url}/sd", FLOATS, wire_dtype="float16", seed=7)
    assert torch.equal(ours, encoded(vaes["sd"], FLOATS.half().float(), "sample"))


def test_one_address_for_both_encodes_a_picture(url: str, vaes: dict[str, Any]) -> None:
    """Hugging Face's client posts a PNG, without a Content-Type, to the address that decodes."""
    image = noise(43, 30)
    answer = requests.post(f"{url}/sd", params={"seed": 7}, data=file_of(image), timeout=30)
    assert answer.headers["content-type"] == "tensor/binary"
    shape = list(map(int, answer.headers["shape"].strip("[]").split(",")))
    latents = torch.frombuffer(bytearray(answer.content), dtype=torch.float32).view(shape)
    assert torch.equal(latents, encoded(vaes["sd"], preprocessed(image), "sample"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ["png without its end", "bomb of png", "bomb of webp", "gif", "1 x 1"])
def test_over_http_a_hostile_file_is_a_400_and_the_server_lives_on(url: str, name: str) -> None:
    answer = requests.post(f"{url}/sd/encode", data=HOSTILE[name], timeout=30)
    assert (answer.status_code, answer.json()["code"], answer.json()["parameter"]) == (400, "bad_request", "image")
    assert remote_encode(f"{url}/sd", noise(8, 8)).shape == (1, 4, 1, 1)


def test_there_and_back_is_diffusers_there_and_back(url: str, vaes: dict[str, Any]) -> None:
    image = noise(32, 24)
    for kind in IMAGE_KINDS:
        latents = remote_encode(f"{url}/{kind}", image, do_scaling=True, sample_mode="argmax")
        decoded = remote_decode(f"{url}/{kind}", latents, output_type="pt")
        with torch.inference_mode():
            theirs = vaes[kind].decode(encoded(vaes[kind], preprocessed(image), "argmax")).sample
        assert torch.allclose(decoded, theirs, atol=1e-4)
