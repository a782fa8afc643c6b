"""The model on the server: what it reports of itself, and the module that stands for it in ComfyUI."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from remote_vae import RemoteVAE
from remote_vae.errors import BadRequest, BrokenReply
from remote_vae.protocol.model_description import ModelDescription

from .address import listing, token_for
from .latents import CHOICES, READY, Latents
from .progress import Progress

Ratio = int | tuple[Callable[[int], int], int, int]
TRAVEL = (torch.float16, torch.bfloat16, torch.float32)


def frames_of(latents: int, ratio: int) -> int:
    """Frames that so many latents along time make: the first stands for one frame, each other for `ratio`."""
    return max(0, latents * ratio - (ratio - 1))


def latents_of(frames: int, ratio: int) -> int:
    return max(0, math.floor((frames + ratio - 1) / ratio))


@dataclass(frozen=True)
class Geometry:
    """Sizes, as ComfyUI's VAE has them: a number for images, `(time, height, width)` for videos.

    Attributes:
        index_formula: `(time, height, width)`; None for images.
    """

    latent_channels: int
    latent_dim: int
    upscale_ratio: Ratio
    downscale_ratio: Ratio
    index_formula: tuple[int, int, int] | None

    @classmethod
    def reported(cls, description: ModelDescription) -> Geometry:
        """Raises BrokenReply where the server does not say it."""
        channels, ratio = description.latent_channels, description.spatial_ratio
        time = description.temporal_ratio if description.video else 1
        if channels is None or ratio is None or time is None:
            raise BrokenReply("The server does not say what latents it takes; bring it to the version of these nodes")
        if not description.video:
            return cls(channels, 2, ratio, ratio, None)
        up, down = partial(frames_of, ratio=time), partial(latents_of, ratio=time)
        return cls(channels, 3, (up, ratio, ratio), (down, ratio, ratio), (time, ratio, ratio))

    @classmethod
    def like(cls, vae: Any) -> Geometry:
        """That of a VAE of ComfyUI's."""
        formula = getattr(vae, "downscale_index_formula", None)
        return cls(vae.latent_channels, vae.latent_dim, vae.upscale_ratio, vae.downscale_ratio, formula)


class RemoteModel(torch.nn.Module):
    """Decodes and encodes on the server, with the calls of a local model: pixels in [-1, 1], channels on axis 1.

    Plain data besides: nodes that copy a VAE can, and the token is not in it.

    Args:
        endpoint: URL of the model.
        latents: one of `latents.CHOICES`.
    """

    def __init__(self, endpoint: str, latents: str = READY) -> None:
        super().__init__()
        if latents not in CHOICES:
            raise BadRequest(f"latents is {latents!r}; expected one of {', '.join(CHOICES)}", parameter="latents")
        self.endpoint = endpoint
        self.latents: Latents = CHOICES[latents]
        self._geometry: Geometry | None = None
        # Nodes ask the first parameter for the device and the dtype of a model.
        self.weights_are_on_the_server = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def look(self, wake: bool = False) -> Geometry | None:
        """What is known of the model; None where nothing is, because it is cold.

        Args:
            wake: start it if need be, so that something is.

        Raises:
            RemoteVAEError: no such model, no server, or it cannot be loaded; and BadRequest where `latents` does not fit.
        """
        if self._geometry is None:
            # Waking takes its time and is worth waiting for; that there is no server is to be heard of soon.
            with self._remote(retries=1) as remote:
                description = remote.description()
            to_wake = description.state == "failed" or (wake and description.latent_channels is None)
            if to_wake:
                description = self._woken()
            if to_wake or description.latent_channels is not None:
                geometry = Geometry.reported(description)
                self._check(description)
                self._geometry = geometry
        return self._geometry

    def _woken(self) -> ModelDescription:
        with self._remote() as remote:
            description = remote.description(wake=True)
            if description.state == "failed":
                # Only a request makes a replica that failed try again: this one is answered with the reason, or, by a model
                # that is well by now, with the latents it takes.
                with contextlib.suppress(BadRequest):
                    remote.decode(torch.zeros(1, 1, 1, 1), do_scaling=False, output_type="pt")
                description = remote.description(wake=True)
        return description

    def geometry(self) -> Geometry:
        """As `look`, but something is always known."""
        geometry = self.look(wake=True)
        assert geometry is not None
        return geometry

    def _check(self, description: ModelDescription) -> None:
        tiny = description.class_name == "AutoencoderTiny"
        if tiny and not self.latents.tiny:
            raise BadRequest(
                f"{description.name} is a tiny VAE: it takes latents as the diffusion model has them, so say under "
                "`latents` which family of models yours come from",
                parameter="latents",
            )
        if self.latents.tiny and not tiny:
            raise BadRequest(f"{description.name} is no tiny VAE; set `latents` to {READY!r}", parameter="latents")

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Latents `[B, C, h, w]` or `[B, C, T, h, w]` to pixels `[B, 3, H, W]` or `[B, 3, T, H, W]`, about [-1, 1]."""
        self.geometry()
        if samples.dtype not in TRAVEL:
            samples = samples.float()
        try:
            with self._remote() as remote:
                pixels: torch.Tensor = remote.decode(
                    self.latents.to_decoder(samples), do_scaling=self.latents.normalised, output_type="pt"
                )
        except BadRequest as error:
            if error.parameter == "shape":
                raise BadRequest(f"{error.message}. {self._fitting(samples)}", parameter="shape") from error
            raise
        return pixels

    def _fitting(self, samples: torch.Tensor) -> str:
        """Which models of the server take latents of that shape, in a sentence."""
        channels, video = samples.shape[1], samples.ndim == 5
        names = listing(self.endpoint).fitting(channels, video)
        of_what = f"{channels} channels, of {'a video' if video else 'images'}"
        return f"{of_what}: {', '.join(names)}" if names else f"{of_what}: no model that this server has had awake"

    def _remote(self, retries: int | None = None) -> RemoteVAE:
        """The model, for one call of a node: its user may interrupt it."""
        return RemoteVAE(self.endpoint, token=token_for(self.endpoint), retries=retries, on_wait=Progress())

    def encode(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        """Pixels in [-1, 1], `[B, 3, H, W]` or `[B, 3, T, H, W]`, to latents. The mode of the distribution, as in ComfyUI."""
        self.geometry()
        with self._remote() as remote:
            latents = remote.encode(pixels, do_scaling=self.latents.normalised, sample_mode="argmax")
        return self.latents.from_encoder(torch.as_tensor(latents))
