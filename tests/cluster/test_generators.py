"""The in-cluster path: real diffusers pipelines in Ray actors hand their latents to a VAE deployment through a handle."""

from __future__ import annotations

import asyncio
import pickle
import pickletools
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import serve
from ray.serve.exceptions import RayServeException

from remote_vae import AsyncRemoteVAE, RemoteVAE, open_result, remote_decode
from remote_vae.calls.decode_call import DecodeCall
from remote_vae.errors import BadRequest, BlockingCall, ProtocolMismatch, UnknownModel
from remote_vae.protocol.wire import PROTOCOL
from remote_vae.transports.handle import translated
from running_cluster import Cluster
from samples import latents, pipeline_decode, postprocessed, tiny_vae


def tiny_pipeline(vae_folder: str) -> Any:
    """A real StableDiffusionPipeline with random modules and no text encoder: prompt embeddings are passed in."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder), text_encoder=None, tokenizer=None, unet=unet,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, output_type: str) -> Any:
    """Two steps of the pipeline; the same latents each time."""
    embeddings = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(3))
    return pipeline(
        prompt_embeds=embeddings, negative_prompt_embeds=-embeddings, num_inference_steps=2, output_type=output_type,
        generator=torch.Generator().manual_seed(4),
    ).images  # fmt: skip


@ray.remote(num_cpus=0.1)
class Generator:
    """A sync actor with a pipeline of its own and the VAE elsewhere."""

    def __init__(self, vae_folder: str) -> None:
        torch.set_num_threads(1)
        self.pipeline = tiny_pipeline(vae_folder)
        self.vae = RemoteVAE.from_app("sd")

    def image_and_its_local_twin(self) -> tuple[np.ndarray, np.ndarray]:
        remote = self.vae.decode(generate(self.pipeline, "latent"), image_format="png")
        return np.asarray(remote), np.asarray(generate(self.pipeline, "pil")[0])

    def reference(self, z: torch.Tensor) -> list[Any]:
        return [self.vae.decode(z, output_type="pt", as_ref=True)]


@ray.remote(num_cpus=0.1)
class AsyncGenerator:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def decode(self, z: torch.Tensor) -> torch.Tensor:
        async with AsyncRemoteVAE(self.handle) as vae:
            return (await vae.decode(z, output_type="pt")).clone()

    async def decode_many(self, batch: list[torch.Tensor]) -> list[tuple[int, int]]:
        vae = AsyncRemoteVAE.from_app("sd")
        task = await vae.submit(batch[0])
        images = [await task, *[image async for image in vae.map(batch[1:])]]
        return [image.size for image in images]

    async def decode_blocking(self, z: torch.Tensor) -> str:
        try:
            RemoteVAE(self.handle).decode(z)
        except BlockingCall as error:
            return str(error)
        return "it blocked"


@ray.remote(num_cpus=0.1)
def size_of(plain: Any) -> list[int]:
    """Another process that gets the result by reference."""
    return list(open_result(plain).shape)


@pytest.fixture(scope="module")
def generator(cluster: Cluster) -> Any:
    return Generator.remote(cluster.source("sd"))


@pytest.fixture(scope="module")
def async_generator(cluster: Cluster) -> Any:
    return AsyncGenerator.remote(serve.get_app_handle("sd"))


def test_a_generator_actor_gets_the_picture_its_pipeline_would_have_made(generator: Any) -> None:
    remote, local = ray.get(generator.image_and_its_local_twin.remote())
    np.testing.assert_array_equal(remote, local)


def test_a_driver_decodes_through_a_handle_and_through_remote_decode(cluster: Cluster) -> None:
    z = latents(1, 4, 8, 8)
    expected = pipeline_decode(tiny_vae("sd"), z)
    handle = serve.get_app_handle("sd")
    torch.testing.assert_close(remote_decode(handle, z, output_type="pt"), expected, atol=2e-5, rtol=0)
    image = remote_decode(handle, z, image_format="png")
    difference = np.asarray(image, int) - np.asarray(postprocessed(expected, "pil")[0])
    assert np.abs(difference).max() <= 1


def test_both_doors_describe_the_model_alike(cluster: Cluster) -> None:
    with RemoteVAE.from_app("flux") as by_handle, RemoteVAE(f"{cluster.url}/flux") as by_http:
        # How many replicas there are only the ingress knows.
        assert by_handle.describe() | {"replicas": 1} == by_http.describe()
        assert by_handle.describe()["scaling_factor"] == 0.3611


def test_a_result_travels_on_as_a_reference(generator: Any) -> None:
    (reference,) = ray.get(generator.reference.remote(latents(1, 4, 8, 8)))
    assert isinstance(reference, ray.ObjectRef)
    assert ray.get(size_of.remote(reference)) == [1, 3, 64, 64]


def test_an_async_actor_awaits(async_generator: Any) -> None:
    z = latents(1, 4, 8, 8)
    decoded = ray.get(async_generator.decode.remote(z))
    torch.testing.assert_close(decoded, pipeline_decode(tiny_vae("sd"), z), atol=2e-5, rtol=0)
    batch = [latents(1, 4, 8, width) for width in (4, 8, 16, 12, 20)]
    assert ray.get(async_generator.decode_many.remote(batch)) == [(32, 64), (64, 64), (128, 64), (96, 64), (160, 64)]


def test_a_blocking_call_in_an_async_actor_names_the_other_class(async_generator: Any) -> None:
    assert "AsyncRemoteVAE" in ray.get(async_generator.decode_blocking.remote(latents(1, 4, 8, 8)))


@pytest.mark.parametrize("door", ["http", "handle"])
def test_the_sync_client_works_under_a_running_loop_as_in_a_notebook(cluster: Cluster, door: str) -> None:
    endpoint = f"{cluster.url}/sd" if door == "http" else serve.get_app_handle("sd")

    async def cell() -> tuple[int, int]:
        with RemoteVAE(endpoint) as vae:
            size: tuple[int, int] = vae.decode(latents(2, 4, 8, 8))[1].size
            return size

    assert asyncio.run(cell()) == (64, 64)


def test_a_model_is_found_while_an_update_of_it_is_being_built(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For those seconds Serve does not know an application's first deployment, whose replicas run."""

    def forgotten(name: str) -> None:
        raise RayServeException(f"Application '{name}' does not exist.")

    monkeypatch.setattr(serve, "get_app_handle", forgotten)
    with RemoteVAE.from_app("sd") as vae:
        assert vae.decode(latents(1, 4, 8, 8), output_type="pt").shape == (1, 3, 64, 64)
    with pytest.raises(UnknownModel, match="nowhere"):
        RemoteVAE.from_app("nowhere")


def test_an_error_keeps_its_class_through_ray(cluster: Cluster) -> None:
    with RemoteVAE.from_app("sd") as vae, pytest.raises(BadRequest, match="expected") as caught:
        vae.decode(latents(1, 5, 8, 8))
    assert caught.value.parameter == "shape"


def test_an_unknown_application_is_an_unknown_model(cluster: Cluster) -> None:
    with pytest.raises(UnknownModel, match="nowhere"):
        RemoteVAE.from_app("nowhere")


def test_a_peer_of_another_protocol_is_told_both_numbers(cluster: Cluster) -> None:
    handle = serve.get_app_handle("sd")
    with pytest.raises(Exception, match="protocol") as caught:
        handle.decode.remote((99, "from", "the", "future")).result(timeout_s=30)
    error = translated(caught.value)
    assert isinstance(error, ProtocolMismatch)
    assert str(PROTOCOL) in str(error)
    assert "99" in str(error)


def test_nothing_of_ours_and_no_torch_is_pickled_on_the_way() -> None:
    (request,) = DecodeCall(latents(1, 4, 8, 8)).requests()
    names = {
        str(argument) for _, argument, _ in pickletools.genops(pickle.dumps(request.to_plain(), protocol=5)) if argument
    }
    assert not [name for name in names if "remote_vae" in name or "torch" in name]
