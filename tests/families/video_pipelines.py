"""Whole video pipelines of diffusers around a tiny autoencoder, and the pixels and statistics that the cases share.

The pipelines are real and are called whole. What they denoise with is not: a transformer that answers zeros, and a
scheduler whose last step is the latents asked for, so that the call ends as if they had been denoised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

SEED = 11
"""Of the generators that a pipeline is given, where it draws from one."""


class Denoiser(torch.nn.Module):
    """Has the config that a pipeline reads of its transformer, and answers zeros."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, **config: Any):
        super().__init__()
        self.config = FrozenDict(config)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(sample=torch.zeros_like(hidden_states))

    @contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        yield


def ending(denoised: torch.Tensor, scheduler: Any = None) -> Any:
    """A scheduler, flow matching unless given, whose every step comes to these latents."""
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    scheduler.step = lambda *args, **kwargs: FlowMatchEulerDiscreteSchedulerOutput(prev_sample=denoised)
    return scheduler


def keeping(scheduler: Any = None) -> Any:
    """A scheduler that adds no noise to the latents of an image or video that a pipeline has encoded."""
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    scheduler.add_noise = lambda original, noise, timestep: original
    scheduler.scale_noise = lambda original, timestep, noise: original
    return scheduler


def called(pipe: Any, output_type: str, **arguments: Any) -> torch.Tensor:
    """What a whole pipeline returns after one step."""
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 1, "return_dict": False, "generator": generator()} | arguments
    return pipe(output_type=output_type, **given)[0]


def generator(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(batch: int, width: int = 8) -> torch.Tensor:
    """Embeddings of a prompt; the denoiser does not look at them."""
    return torch.zeros(batch, 1, width)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def pixels(*shape: int) -> Callable[[], torch.Tensor]:
    """Random pixels in [-1, 1] of this shape."""
    return cache(lambda: torch.rand(*shape, generator=generator(2)) * 2 - 1)


def statistics(channels: int) -> tuple[list[float], list[float]]:
    """A mean and a standard deviation for each channel, far from 0 and 1."""
    draws = torch.rand(2, channels, generator=generator(3))
    return (draws[0] * 2 - 1).tolist(), (draws[1] * 1.5 + 0.4).tolist()


def tiny(autoencoder: Any, loudness: float = 1.0, **config: Any) -> Callable[[], Any]:
    """Builds, once, an autoencoder with this config and random weights.

    Args:
        autoencoder: a class of diffusers.
        loudness: factor on the weights of more than one axis: the pixels of some tiny modules hardly depend on their
            latents otherwise.
    """

    @cache
    def build() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = autoencoder(**config).eval().requires_grad_(False)
            for parameter in module.parameters():
                # What begins as zero, such as the scale of injected noise, would take part in nothing.
                if not parameter.any():
                    parameter.normal_(std=0.2)
                elif parameter.ndim > 1:
                    parameter.mul_(loudness)
        return module

    return build


def buffers(build: Callable[[], Any], values: Mapping[str, list[float]]) -> Callable[[], Any]:
    """The same, with these values in the module's buffers."""

    @cache
    def filled() -> Any:
        module = build()
        for name, value in values.items():
            getattr(module, name).copy_(torch.tensor(value))
        return module

    return filled
