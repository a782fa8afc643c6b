"""What lies in a LATENT, and what the decoder on the server takes.

ComfyUI's samplers hand on what `latent_format.process_out` made: for most families, latents that are ready for the decoder. Two
kinds are not, and no server can tell from the numbers: families whose VAE normalises by itself in ComfyUI (LTX-Video), and
tiny decoders, which take latents as the diffusion model has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Latents:
    """How to get from a LATENT to the decoder.

    Attributes:
        normalised: the server applies the model's own convention.
        scale, shift: `(z - shift) * scale` is what a tiny decoder takes.
    """

    normalised: bool = False
    scale: float | None = None
    shift: float = 0.0

    @property
    def tiny(self) -> bool:
        return self.scale is not None

    def to_decoder(self, samples: torch.Tensor) -> torch.Tensor:
        return samples if self.scale is None else (samples - self.shift) * self.scale

    def from_encoder(self, samples: torch.Tensor) -> torch.Tensor:
        return samples if self.scale is None else samples / self.scale + self.shift


READY = "as ComfyUI has them"
CHOICES: dict[str, Latents] = {
    READY: Latents(),
    "normalised (LTX-Video)": Latents(normalised=True),
    "for a tiny VAE of SD 1.x": Latents(scale=0.18215),
    "for a tiny VAE of SDXL": Latents(scale=0.13025),
    "for a tiny VAE of SD3": Latents(scale=1.5305, shift=0.0609),
    "for a tiny VAE of Flux.1": Latents(scale=0.3611, shift=0.1159),
}
