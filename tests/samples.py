"""Tiny random models with real classes, real layouts and statistics that are not trivial; and what diffusers makes of
latents with them: the reference of every exactness test. Seeded; nothing here calls our own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderTiny, FluxPipeline
from diffusers.image_processor import VaeImageProcessor

IMAGE_KINDS = ("sd", "sdxl", "sd3", "flux", "tiny")
KINDS = (*IMAGE_KINDS, "hunyuan")
KL = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "sample_size": 64,
}
HUNYUAN = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
    "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.476986,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    },
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
            "use_post_quant_conv": False},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
             "use_post_quant_conv": False},
}  # fmt: skip


def tiny_vae(kind: str, seed: int = 0) -> Any:
    """A model of that kind with random weights large enough that every channel and layer shows in the output."""
    generator = torch.random.fork_rng()
    with generator:
        torch.manual_seed(seed)
        if kind == "tiny":
            channels = (16,) * 4
            vae: Any = AutoencoderTiny(
                encoder_block_out_channels=channels, decoder_block_out_channels=channels,
                num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4, latent_channels=4,
            )  # fmt: skip
        elif kind.startswith("hunyuan"):
            vae = AutoencoderKLHunyuanVideo(**HUNYUAN | ({"latent_channels": 16} if kind == "hunyuan16" else {}))
        else:
            vae = AutoencoderKL(**KL, **CONFIGS[kind])
        for parameter in vae.parameters():  # norms start at 1 and 0, which would hide a forgotten one
            parameter.data += 0.05 * torch.randn_like(parameter)
        if kind == "tiny":  # its output would be all but black
            vae.decoder.layers[-1].weight.data *= 12
            vae.decoder.layers[-1].bias.data += 0.6
    return vae.eval().requires_grad_(False)


def save_tiny_vae(kind: str, folder: Path) -> Path:
    tiny_vae(kind).save_pretrained(folder)
    return folder


def latents(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples_of(kind: str, batch: int = 1) -> dict[str, tuple[torch.Tensor, dict[str, int]]]:
    """Latents in every layout that pipelines of that kind put out, and the arguments that go with them."""
    if kind == "hunyuan":
        return {"video": (latents(1, 4, 3, 4, 6), {})}
    channels = 16 if kind in ("sd3", "flux") else 4
    samples = {
        "images": (latents(batch, channels, 8, 12), {}),
        "one image": (latents(channels, 8, 12), {}),
        "frames": (latents(1, channels, 3, 8, 4), {}),
    }
    if kind == "flux":
        samples["packed"] = (latents(batch, 24, 64), {"height": 64, "width": 96})
    return samples


def pipeline_decode(vae: Any, z: torch.Tensor, height: int | None = None, width: int | None = None) -> torch.Tensor:
    """What the model's pipelines do with their latents up to the decoder's output, written with diffusers' own code."""
    config = vae.config
    if z.ndim == 3 and height is not None:
        z = FluxPipeline._unpack_latents(z, height, width, vae_scale_factor=8)
    elif z.ndim == 3:
        z = z[None]
    video = z.ndim == 5 and isinstance(vae, (AutoencoderKL, AutoencoderTiny))
    frames = z.shape[2] if video else 1
    if video:
        z = z.permute(0, 2, 1, 3, 4).flatten(0, 1)  # as AnimateDiffPipeline.decode_latents
    if getattr(config, "latents_mean", None) is not None:  # StableDiffusionXLPipeline
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        z = z * std / config.scaling_factor + mean
    elif getattr(config, "shift_factor", None):  # StableDiffusion3Pipeline, FluxPipeline
        z = (z / config.scaling_factor) + config.shift_factor
    else:  # StableDiffusionPipeline
        z = z / config.scaling_factor
    with torch.inference_mode():
        pixels = vae.decode(z, return_dict=False)[0]
    return pixels.unflatten(0, (-1, frames)).transpose(1, 2) if video else pixels


def postprocessed(pixels: torch.Tensor, output_type: str) -> Any:
    """diffusers' own post-processing of images `[B, 3, H, W]`."""
    return VaeImageProcessor().postprocess(pixels, output_type=output_type)
