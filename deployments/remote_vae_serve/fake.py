"""An engine without a model: right shapes, made-up pixels, and a wait as a busy GPU's. For tests and load tests only."""

from __future__ import annotations

import time

import torch

from remote_vae.encoding import SampleMode
from remote_vae_serve.config import FakeEngineConfig
from remote_vae_serve.engine import Engine
from remote_vae_serve.families import LatentSpace


class FakeEngine(Engine):
    """Takes image latents of `channels` channels; the picture of a latent is its first channel, eight times as large."""

    def __init__(self, config: FakeEngineConfig) -> None:
        self._config = config
        self.device, self.dtype, self.encode_dtype = "cpu", torch.float32, torch.float32

    def load(self) -> None:
        fields = {"latent_channels": self._config.channels, "block_out_channels": [1] * 4, "scaling_factor": 1.0}
        self.space = LatentSpace.of("AutoencoderKL", fields)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        time.sleep(self._config.decode_s)
        grey = latents[:, :1].repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)
        return grey.expand(-1, 3, -1, -1)

    def encode(
        self, pixels: torch.Tensor, mode: SampleMode = SampleMode.SAMPLE, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        time.sleep(self._config.decode_s)
        return pixels[:, :1, ::8, ::8].expand(-1, self._config.channels, -1, -1)
