"""Image pipelines around a tiny autoencoder, called whole, and the pieces of them that the image cases share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import PipelineState

from families.ends import bare
from families.video_pipelines import Denoiser, called, ending, generator, keeping, words

SIZE = {"height": 32, "width": 48}
"""Not square, so that a height taken for a width shows."""


def coming_to(latents: torch.Tensor, scheduler: Any = None) -> Any:
    """A scheduler whose step comes to these latents; they must have the shape of those that the pipeline denoises."""
    scheduler = ending(latents, scheduler)
    come = scheduler.step

    def step(model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert sample.shape == latents.shape, (sample.shape, latents.shape)
        return come(model_output, timestep, sample)

    scheduler.step = step
    return scheduler


def of_unet(pipeline: Any, vae: Any, latents: torch.Tensor, output_type: str = "pt", **arguments: Any) -> torch.Tensor:
    """What a pipeline of the Stable Diffusion kind makes of these latents."""
    unet = Denoiser(in_channels=latents.shape[1], sample_size=8, time_cond_proj_dim=None, addition_time_embed_dim=8)
    unet.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=7 * 8))  # six numbers and the words
    scheduler = coming_to(latents, DDIMScheduler(steps_offset=1, clip_sample=False))
    pipe = whole(pipeline, vae=vae, unet=unet, scheduler=scheduler)
    given = {"prompt_embeds": words(len(latents)), "guidance_scale": 1.0} | SIZE
    return called(pipe, output_type, **given | arguments)


def of_transformer(
    pipeline: Any, vae: Any, latents: torch.Tensor, output_type: str = "pt", config: Any = None, **arguments: Any
) -> torch.Tensor:
    """What a flow matching pipeline makes of these latents; `config` is what it reads of its transformer."""
    pipe = bare(pipeline, vae=vae, scheduler=coming_to(latents), transformer=Denoiser(**config or {}))
    given = {"prompt_embeds": words(len(latents))} | SIZE
    if "guidance_scale" in inspect.signature(pipeline.__call__).parameters:
        given["guidance_scale"] = 1.0
    return called(pipe, output_type, **given | arguments)


def without_noise(pipeline: Any, vae: Any, image: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """The latents that an image-to-image pipeline's `prepare_latents` makes of an image, less the noise."""
    pipe = whole(pipeline, vae=vae, scheduler=keeping(DDIMScheduler(steps_offset=1, clip_sample=False)))
    given = {"timestep": None, "num_images_per_prompt": 1, "dtype": torch.float32, "device": "cpu"}
    with torch.no_grad():
        return pipe.prepare_latents(image, batch_size=len(image), generator=generator(), **given | arguments)


def whole(pipeline: Any, **parts: Any) -> Any:
    """`bare`, without the checker of pictures where the pipeline has one."""
    checked = "requires_safety_checker" in inspect.signature(pipeline.__init__).parameters
    return bare(pipeline, **parts, **{"requires_safety_checker": False} if checked else {})


def modular(steps: tuple[Any, ...], vae: Any, **values: Any) -> torch.Tensor:
    """The pictures that the last steps of a modular pipeline make of these values."""
    state = PipelineState()
    for name, value in values.items():
        state.set(name, value)
    components = SimpleNamespace(vae=vae, image_processor=VaeImageProcessor())
    for step in steps:
        components, state = step()(components, state)
    return state.get("images")


def lit(build: Callable[[], Any], last: Callable[[Any], Any]) -> Callable[[], Any]:
    """The same, its decoder's last layer brighter: pixels that would lie around 0, where half are cut off, lie around 0.5."""

    @cache
    def brighter() -> Any:
        vae = build()
        last(vae.decoder).bias.add_(0.5)
        return vae

    return brighter
