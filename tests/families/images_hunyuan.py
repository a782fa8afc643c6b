"""HunyuanImage's two autoencoders: a plain one, and the refiner's, which folds frames into channels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    HunyuanImagePipeline,
    HunyuanImageRefinerPipeline,
)

from families.case import Case, Encode
from families.ends import bare
from families.images_made import of_transformer
from families.video_pipelines import SEED, generator, pixels, random, tiny, words

_HUNYUAN = tiny(
    AutoencoderKLHunyuanImage, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32),
    layers_per_block=1, scaling_factor=0.75289, spatial_compression_ratio=8, sample_size=128,
)  # fmt: skip
_REFINER = tiny(
    AutoencoderKLHunyuanImageRefiner, in_channels=3, out_channels=3, latent_channels=4,
    block_out_channels=(16, 16, 16, 16), layers_per_block=1, scaling_factor=0.6, spatial_compression_ratio=8,
    temporal_compression_ratio=4,
)  # fmt: skip


def _image(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    config = {"in_channels": 4, "guidance_embeds": False, "use_meanflow": False}
    mask = torch.ones(len(latents), 1)
    given = {"prompt_embeds_mask": mask, "prompt_embeds_2": words(len(latents)), "prompt_embeds_mask_2": mask}
    return of_transformer(HunyuanImagePipeline, vae, latents, output_type, config, **given)


def _refined(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    given = {"prompt_embeds_mask": torch.ones(len(latents), 1), "image": pixels(2, 3, 32, 48)() / 2 + 0.5}
    return of_transformer(HunyuanImageRefinerPipeline, vae, latents, output_type, {"in_channels": 16}, **given)


def _refiner_encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return bare(HunyuanImageRefinerPipeline, vae=vae)._encode_vae_image(image.unsqueeze(2), generator())


CASES = (
    Case(
        name="AutoencoderKLHunyuanImage",
        class_name="AutoencoderKLHunyuanImage",
        build=_HUNYUAN,
        latents=lambda vae: _image(vae, random(2, 4, 4, 6), "latent"),
        reference=_image,
        media="image",
        origin="pipeline",
        pipelines=("HunyuanImagePipeline",),
        notes="No pipeline encodes with it.",
    ),
    Case(
        name="AutoencoderKLHunyuanImageRefiner",
        class_name="AutoencoderKLHunyuanImageRefiner",
        build=_REFINER,
        latents=lambda vae: _refined(vae, random(2, 8, 1, 4, 6), "latent"),
        reference=_refined,
        media="image",
        origin="pipeline",
        pipelines=("HunyuanImageRefinerPipeline",),
        encode=Encode(pixels(2, 3, 32, 48), _refiner_encoded, "sample", "end of pipeline", SEED),
        notes="Two frames lie in the channels of one; the first of them is dropped. Encoded latents have both again.",
    ),
)
