"""An engine without a model: right shapes, made-up pixels, and a wait as a busy GPU's. For tests and load tests only."""

from __future__ import annotations

import time
from functools import cached_property

import torch
from torch.nn.functional import interpolate

from remote_vae.decoding import Output
from remote_vae.encoding import SampleMode
from remote_vae_serve.autoencoders import latent_space_of
from remote_vae_serve.config import FakeEngineConfig
from remote_vae_serve.engine import Decoded, Engine
from remote_vae_serve.layouts import SAID_NOTHING, Said
from remote_vae_serve.tiling import WHOLE, Plan

TILE = 1024


class FakeEngine(Engine):
    """Takes image latents of `channels` channels; the picture of a latent is its first channel, eight times as large, or with
    `pixels` always the same one."""

    def __init__(self, config: FakeEngineConfig) -> None:
        self._config = config
        self.device, self.dtype, self.encode_dtype = "cpu", torch.float32, torch.float32

    def load(self) -> None:
        fields = {"latent_channels": self._config.channels, "block_out_channels": [1] * 4, "scaling_factor": 1.0}
        self.space = latent_space_of("AutoencoderKL", fields)
        if self._config.pixels is not None:
            _ = self._ready

    @cached_property
    def _ready(self) -> torch.Tensor:
        """`[1, H, W, 3]`, uint8."""
        assert self._config.pixels is not None
        return picture(*self._config.pixels)

    def decode(self, latents: torch.Tensor, plan: Plan = WHOLE, said: Said = SAID_NOTHING) -> Decoded:
        self._wait(latents.shape[0] * latents.shape[-2] * latents.shape[-1] * self.space.ratio**2)
        if self._config.pixels is not None:
            return Decoded(self._ready.permute(0, 3, 1, 2).expand(len(latents), -1, -1, -1), self.dtype)
        grey = latents[:, :1].repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)
        return Decoded(grey.expand(-1, 3, -1, -1), self.dtype)

    def leave(self, pixels: torch.Tensor, output: Output) -> torch.Tensor:
        if self._config.pixels is None:
            return super().leave(pixels, output)
        if output in (Output.PT, Output.UNIT):
            return super().leave(pixels.float() / 127.5 - 1, output)
        return pixels.permute(0, 2, 3, 1)

    def encode(
        self, pixels: torch.Tensor, mode: SampleMode = SampleMode.SAMPLE, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        self._wait(pixels.shape[0] * pixels.shape[-2] * pixels.shape[-1])
        return pixels[:, :1, ::8, ::8].expand(-1, self._config.channels, -1, -1)

    def _wait(self, pixels: int) -> None:
        if seconds := self._config.decode_s + self._config.seconds_per_megapixel * pixels / 2**20:
            time.sleep(seconds)  # not of nothing: that takes a tenth of a millisecond


def picture(height: int, width: int) -> torch.Tensor:
    """A picture `[1, H, W, 3]`, uint8, the same each time: clouds, which compress about as well as a photograph does. From 1024
    pixels on it repeats."""
    noise = torch.Generator().manual_seed(0)
    tile = torch.full((1, 3, TILE, TILE), 128.0)
    for octave in range(9):
        size = TILE >> octave
        grey, colour = (torch.randn(1, channels, size, size, generator=noise) for channels in (1, 3))
        tile += 1.5 * 1.6**octave * interpolate(grey + 0.4 * colour, TILE, mode="bilinear")
    tile = tile.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    rows, columns = torch.arange(height) % TILE, torch.arange(width) % TILE
    return tile[:, rows][:, :, columns].contiguous()
