"""What people do with a pipeline besides calling it: `as_autoencoder()` in copies, pickles, offloading, compilation, other
pipelines of its parts, previews and Modular Diffusers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForInpainting,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep

from remote_vae.autoencoder.remote_autoencoder import RemoteAutoencoder
from replica_server import Server, folder, in_rows, pixels_of, running, server
from samples import latents, tiny_vae
from tiny_pipelines import arguments, output, pipeline

__all__ = ["folder", "running", "server"]  # fixtures


@pytest.fixture
def pipe(server: Server, folder: Path) -> Any:
    return pipeline("sd", server.vae("sd"), folder / "words")


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return pixels_of(pipeline("sd", tiny_vae("sd"), folder / "words"), "sd")


def copied(pipe: Any) -> Any:
    return copy.deepcopy(pipe)


def pickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("again", [copied, pickled])
def test_a_copy_makes_the_same_and_asks_nothing_anew(
    server: Server, pipe: Any, folder: Path, expected: torch.Tensor, again: Any
) -> None:
    pipe.vae.register_to_config(scaling_factor=pipe.vae.config.scaling_factor, sample_size=77)
    other = again(pipe.to(torch.bfloat16))
    assert other.vae is not pipe.vae
    assert (other.vae.dtype, other.vae.config.sample_size) == (torch.bfloat16, 77)
    other.to(torch.float32)
    assert pipe.vae.dtype == torch.bfloat16, "each has its own"
    assert server.models.asked == ["describe"]
    assert torch.equal(pixels_of(pipeline("sd", other.vae, folder / "words"), "sd"), expected)


def test_a_copy_goes_by_the_same_connections(server: Server) -> None:
    vae = server.vae("sd")
    assert copy.deepcopy(vae)._remote is vae._remote
    assert pickle.loads(pickle.dumps(vae))._remote is not vae._remote


def test_it_is_of_its_models_class(server: Server) -> None:
    """Some pipelines ask: which ratio, whether it can be fused, whether it takes a mask."""
    vae = server.vae("sd")
    assert isinstance(vae, AutoencoderKL)
    assert isinstance(vae, RemoteAutoencoder)
    assert type(vae) is RemoteAutoencoder


def test_it_may_be_compiled_and_takes_other_sizes_after_it(server: Server) -> None:
    vae, local = server.vae("sd"), tiny_vae("sd")
    decode, compiled = torch.compile(vae.decode, backend="eager"), torch.compile(vae, backend="eager")
    for height in (2, 4, 6):
        z = latents(1, 4, height, 2)
        with torch.no_grad():
            theirs = local.decode(z).sample
            assert torch.equal(decode(z, return_dict=False)[0], theirs)
            assert torch.equal(compiled.decode(z).sample, theirs)


def test_a_pipeline_of_the_same_parts_takes_it(pipe: Any, folder: Path) -> None:
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 16:] = 1

    def inpainted(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        asked = arguments("sd") | {"image": picture, "mask_image": mask, "strength": 1.0}
        return output(pipe(**asked))

    local = pipeline("sd", in_rows(tiny_vae("sd")), folder / "words")
    theirs = inpainted(StableDiffusionInpaintPipeline(**local.components, requires_safety_checker=False))
    for other in (
        AutoPipelineForInpainting.from_pipe(pipe),
        StableDiffusionInpaintPipeline.from_pipe(pipe, vae=pipe.vae),
        StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False),
    ):
        assert other.vae is pipe.vae
        assert torch.equal(inpainted(other), theirs)


def test_a_callback_sees_previews(pipe: Any, expected: torch.Tensor) -> None:
    previews = []

    def show(pipe: DiffusionPipeline, step: int, time: int, values: dict[str, Any]) -> dict[str, Any]:
        previews.append(pipe.vae.decode(values["latents"] / pipe.vae.config.scaling_factor).sample)
        return {}

    assert torch.equal(pixels_of(pipe, "sd", callback_on_step_end=show), expected)
    assert [tuple(preview.shape) for preview in previews] == [(1, 3, 32, 48)] * 2


def test_modular_diffusers_decodes_with_it(server: Server) -> None:
    def decoded(vae: Any) -> torch.Tensor:
        blocks = StableDiffusionXLDecodeStep().init_pipeline()
        blocks.update_components(vae=vae)
        made = blocks(latents=latents(1, 4, 4, 6), output_type="pt", output="images")
        assert isinstance(made, torch.Tensor)
        return made

    assert torch.equal(decoded(server.vae("sdxl")), decoded(tiny_vae("sdxl")))
