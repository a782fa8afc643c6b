"""The models that are measured, at full size with random weights: speed and memory do not depend on what the weights are.

Each configuration is that of the checkpoint named beside it (its vae's config.json); what it leaves out is the class's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch

SEED = 0
LATENTS_SEED = 1


@dataclass(frozen=True)
class Size:
    """Of what comes out, in pixels; `frames` of a video."""

    width: int
    height: int
    frames: int | None = None

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames else "")


@dataclass(frozen=True)
class Model:
    """A row of the tables.

    Attributes:
        name: on the command line.
        title: for people.
        class_name: in diffusers.
        config: of the class.
        source: where the configuration is from.
        channels: of the latents.
        dtypes: what its pipelines decode in, first; then what else is worth a row.
        sizes: the first one is measured first, and in every way.
    """

    name: str
    title: str
    class_name: str
    config: Mapping[str, Any]
    source: str
    channels: int
    dtypes: tuple[str, ...]
    sizes: tuple[Size, ...] = field(default=(Size(1024, 1024),))

    @property
    def is_video(self) -> bool:
        return self.sizes[0].frames is not None

    def build(self, dtype: str, device: str) -> Any:
        """The autoencoder, with the same weights for every dtype, not trained."""
        torch.manual_seed(SEED)
        with torch.device(device):
            vae = getattr(diffusers, self.class_name)(**self.config)
        # Not vae.to: diffusers' own warns of modules to be kept in float32, of which these have none.
        return torch.nn.Module.to(vae, getattr(torch, dtype)).eval().requires_grad_(False)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """`[1, C, h, w]` or `[1, C, T, h, w]`: all of these compress 8 times along an edge, and 4 times in time."""
        frames = () if size.frames is None else ((size.frames - 1) // 4 + 1,)
        return (1, self.channels, *frames, size.height // 8, size.width // 8)

    def latents(self, size: Size, dtype: str) -> torch.Tensor:
        """Standard normal, on the host."""
        generator = torch.Generator().manual_seed(LATENTS_SEED)
        return torch.randn(self.latent_shape(size), generator=generator).to(getattr(torch, dtype))


BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
KL = BLOCKS | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
SQUARES = (Size(1024, 1024), Size(512, 512), Size(2048, 2048))

MODELS = (
    Model(
        "sd15", "Stable Diffusion 1.5", "AutoencoderKL", KL | {"latent_channels": 4, "sample_size": 512},
        "stable-diffusion-v1-5/stable-diffusion-v1-5", 4, ("float16",), SQUARES,
    ),
    # Its pipeline raises a half-precision VAE to float32 (force_upcast). bfloat16 does not overflow, and is what our server uses.
    Model(
        "sdxl", "SDXL", "AutoencoderKL", KL | {"latent_channels": 4, "sample_size": 1024},
        "stabilityai/sdxl-vae", 4, ("float32", "bfloat16"), SQUARES,
    ),
    Model(
        "flux", "Flux.1", "AutoencoderKL",
        KL | {"latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False},
        "black-forest-labs/FLUX.1-dev", 16, ("bfloat16",),
    ),
    Model(
        "hunyuan", "HunyuanVideo", "AutoencoderKLHunyuanVideo", {},
        "hunyuanvideo-community/HunyuanVideo: the class's defaults", 16, ("float16",), (Size(512, 320, 61),),
    ),
    Model(
        "wan", "Wan 2.1", "AutoencoderKLWan", {},
        "Wan-AI/Wan2.1-T2V-14B-Diffusers: the class's defaults", 16, ("float32", "bfloat16"), (Size(832, 480, 81),),
    ),
)  # fmt: skip

NARROW: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64},
    "sdxl": {"sample_size": 128},
    "flux": {"sample_size": 128},
    "hunyuan": {},
    "wan": {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
}


def tiny(model: Model) -> Model:
    """The same architecture, narrow and an eighth of the size along an edge: to see that a run runs, not how fast."""
    sizes = tuple(Size(s.width // 8, s.height // 8, None if s.frames is None else 17) for s in model.sizes)
    if model.is_video:
        sizes = (Size(64, 32, 17),)
    narrow: dict[str, Any] = {} if model.name == "wan" else NARROW
    return replace(model, config=dict(model.config) | narrow | TINY_CONFIGS[model.name], sizes=sizes)
