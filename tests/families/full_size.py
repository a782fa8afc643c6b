"""The autoencoders at full size, with random weights and small latents: how far bfloat16 takes them from float32.

Each configuration is its class's default, or that of the checkpoint named beside it. A class that is missing did not fit into the
memory or the time there was (some have billions of weights), or has no known configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch

from families.case import Case


def _random(shape: tuple[int, ...]) -> Callable[[Any], torch.Tensor]:
    return lambda module: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _build(class_name: str, config: Mapping[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = getattr(diffusers, class_name)(**config).eval().requires_grad_(False)
            if (
                class_name == "AutoencoderTiny"
            ):  # its picture would be all but black, and the steps of bfloat16 near -1 as large
                module.decoder.layers[-1].weight.data *= 12
                module.decoder.layers[-1].bias.data += 0.6
            return module

    return build


def _no_reference(module: Any, latents: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError


def _case(
    class_name: str, *shape: int, variant: str = "", config: Mapping[str, Any] | None = None, **said: Any
) -> Case:
    return Case(
        name=f"{class_name}: {variant}" if variant else class_name,
        class_name=class_name,
        build=_build(class_name, config or {}),
        latents=_random(shape),
        reference=_no_reference,
        media="video" if len(shape) == 5 else "image",
        origin="module",
        parameters=said,
    )


_KL = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_FLUX = _KL | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159}
_ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "down_block_out_channels": (128, 256, 512, 512),
    "layers_per_down_block": 2, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "up_block_out_channels": (192, 384, 768, 768), "layers_per_up_block": 3,
}  # fmt: skip
_SVD = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2
}  # fmt: skip
_HUNYUAN_IMAGE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 64, "block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2, "spatial_compression_ratio": 32, "sample_size": 384, "scaling_factor": 0.75289,
}  # fmt: skip
_MOVQ = {
    "block_out_channels": (128, 256, 256, 512), "layers_per_block": 2, "latent_channels": 4, "num_vq_embeddings": 16384,
    "vq_embed_dim": 4, "norm_type": "spatial", "down_block_types": (*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
}  # fmt: skip
FULL_SIZE: tuple[Case, ...] = (
    _case("AutoencoderKL", 1, 4, 64, 64, variant="stabilityai/sd-vae-ft-mse", config=_KL),
    _case("AutoencoderKL", 1, 16, 32, 32, variant="black-forest-labs/FLUX.1-dev", config=_FLUX),
    _case("AsymmetricAutoencoderKL", 1, 4, 32, 32, config=_ASYMMETRIC),
    _case("AutoencoderTiny", 1, 4, 64, 64),
    _case("AutoencoderDC", 1, 32, 8, 8),
    _case("ConsistencyDecoderVAE", 1, 4, 16, 16, seed=3),
    _case("VQModel", 1, 4, 32, 32, variant="kandinsky-community/kandinsky-2-2-decoder", config=_MOVQ),
    _case("AutoencoderKLKVAE", 1, 16, 32, 32),
    _case("AutoencoderKLFlux2", 1, 32, 32, 32),
    _case("AutoencoderKLQwenImage", 1, 16, 1, 24, 24),
    _case("AutoencoderKLQwenImage21", 1, 64, 1, 12, 12),
    _case("AutoencoderKLHunyuanImage", 1, 64, 8, 8, config=_HUNYUAN_IMAGE),
    _case("AutoencoderKLWan", 1, 16, 2, 8, 12),
    _case("AutoencoderKLLTXVideo", 1, 128, 2, 4, 4),
    _case("AutoencoderKLHunyuanVideo", 1, 16, 2, 8, 12),
    _case("AutoencoderKLCogVideoX", 1, 2, 16, 8, 12),
    _case("AutoencoderKLMochi", 1, 12, 2, 8, 12),
    _case("AutoencoderKLCosmos", 1, 16, 2, 8, 12, sigma_data=0.5),
    _case("AutoencoderKLMagvit", 1, 16, 2, 8, 12),
    _case("AutoencoderKLTemporalDecoder", 1, 2, 4, 16, 16, config=_SVD),
    _case("AutoencoderKLKVAEVideo", 1, 16, 2, 8, 8),
    _case("AutoencoderVidTok", 1, 4, 4, 8, 12),
)
