"""What is asked of the server, and what each reply must be: computed here, by diffusers itself where the model is real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import AutoencoderKL
from PIL import Image

from remote_vae_serve.engine import weights

TOLERANCE = 2e-5
"""Of floats against a local float32 decode: threads and batches move the last place."""
FAKE, DIRECT, REAL = "fake", "straight", "demo"
"""The models: two with an engine that waits, of which the second has a path of its own, and the demo model."""
DOORS = {FAKE: "ingress", REAL: "ingress, one replica", DIRECT: "direct"}
"""The way to each. Clients keep to one: who waits for the only replica of a model to start asks nobody else meanwhile."""


@dataclass(frozen=True, eq=False)
class Work:
    """One request and its right answer.

    Attributes:
        verb: what is asked.
        sent: latents `[1, C, h, w]`, or a picture to encode.
        expected: pixels as `output_type=pt` has them, or latents.
    """

    name: str
    model: str
    verb: Literal["decode", "encode"]
    sent: torch.Tensor | Image.Image
    expected: torch.Tensor

    def is_right(self, got: torch.Tensor) -> bool:
        if got.shape != self.expected.shape:
            return False
        return bool((got.float() - self.expected).abs().max() <= TOLERANCE * max(1.0, self.expected.abs().max().item()))


def works() -> list[Work]:
    """Images of two sizes and frames of a video by either door, and the real demo model both ways."""
    shapes = {"image 8": (1, 4, 8, 8), "image 32": (1, 4, 32, 32), "video": (1, 4, 6, 16, 16)}
    waiting = [
        _fake(model, name, shape, seed) for model in (FAKE, DIRECT) for seed, (name, shape) in enumerate(shapes.items())
    ]
    return [*waiting, *_real()]


def _fake(model: str, name: str, shape: tuple[int, ...], seed: int) -> Work:
    """A fake engine's picture of latents is their first channel, eight times as large."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grey = z[:, :1].repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)
    return Work(name, model, "decode", z, grey.expand(-1, 3, *[-1] * (z.ndim - 2)).contiguous())


@torch.inference_mode()
def _real() -> list[Work]:
    vae = AutoencoderKL.from_pretrained(weights.DEMO).eval()
    z = torch.randn(1, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(7))
    shift, factor = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    pixels = vae.decode(z / factor + shift).sample
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    tensor = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(64, 64, 3)
    encoded = vae.encode((tensor.permute(2, 0, 1)[None].float() / 255) * 2 - 1).latent_dist.mode()
    return [
        Work("real image", REAL, "decode", z, pixels),
        Work("encode", REAL, "encode", picture, encoded),  # as the clients expect: no scaling where none is asked for
    ]
