"""An engine without a model: right shapes, made-up pixels, and a wait as a busy GPU's. For tests and load tests only."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property

import torch
from torch.nn.functional import interpolate

from remote_vae.protocol.encode_request import SampleMode
from remote_vae.protocol.output import Output
from remote_vae_serve.config import FakeEngineConfig
from remote_vae_serve.engine.base import Decoded, Encoded, Engine, Event
from remote_vae_serve.engine.tiling import UNTILED, TilingPlan
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints
from remote_vae_serve.families.table import latent_space_of
from remote_vae_serve.processing.latent_processor import LatentProcessor, Unpacked

TILE = 1024


class FakeEngine(Engine):
    """Takes image latents of `channels` channels; the picture of a latent is its first channel, eight times as large, or with
    `pixels` always the same one."""

    def __init__(self, config: FakeEngineConfig, on_event: Callable[[Event], object] = lambda event: None) -> None:
        super().__init__(on_event)
        self._config = config
        self.is_probed = False  # it would wait as for a client's
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

    def decode(self, latents: torch.Tensor, plan: TilingPlan = UNTILED, hints: RequestHints = NO_HINTS) -> Decoded:
        self._wait(latents.shape[0] * latents.shape[-2] * latents.shape[-1] * self.space.ratio**2)
        if self._config.pixels is not None:
            return Decoded(self._ready.permute(0, 3, 1, 2).expand(len(latents), -1, -1, -1), self.dtype)
        grey = latents[:, :1].repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)
        return Decoded(grey.expand(-1, 3, -1, -1), self.dtype)

    @property
    def processor(self) -> LatentProcessor:
        if self._config.pixels is None:
            return super().processor
        return ReadyPixels(self.space, self.dtype, self.encode_dtype)

    def encode(
        self,
        pixels: torch.Tensor,
        mode: SampleMode = SampleMode.SAMPLE,
        generator: torch.Generator | None = None,
        plan: TilingPlan = UNTILED,
    ) -> Encoded:
        self._wait(pixels.shape[0] * pixels.shape[-2] * pixels.shape[-1])
        latents = pixels[:, :1, ::8, ::8].expand(-1, self._config.channels, -1, -1)
        return Encoded(latents, self.encode_dtype)

    def _wait(self, pixels: int) -> None:
        if seconds := self._config.decode_s + self._config.seconds_per_megapixel * pixels / 2**20:
            time.sleep(seconds)  # not of nothing: that takes a tenth of a millisecond


class ReadyPixels(LatentProcessor):
    """Of pixels that are uint8 already: handed over as they are where that is what is asked for."""

    def postprocess_pixels(self, pixels: torch.Tensor, unpacked: Unpacked, output: Output) -> torch.Tensor:
        if output in (Output.PT, Output.UNIT):
            return super().postprocess_pixels(pixels.float() / 127.5 - 1, unpacked, output)
        return pixels.permute(0, 2, 3, 1)


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
