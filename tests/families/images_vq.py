"""VQModel: what is quantised and what is scaled depends on the pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AmusedPipeline,
    DDPMScheduler,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22Pipeline,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    VQModel,
)

from families.case import Case, Encode
from families.ends import bare, end, run
from families.images_made import coming_to, lit
from families.video_pipelines import Denoiser, called, pixels, random, tiny

_TINY: dict[str, Any] = {
    "norm_num_groups": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (16, 32),
    "scaling_factor": 0.5,
}  # fmt: skip
_MOVQ = tiny(
    VQModel, **_TINY | {"block_out_channels": (32, 64)}, norm_type="spatial",
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, num_vq_embeddings=12,
    vq_embed_dim=4,
)  # fmt: skip
_PLAIN: dict[str, Any] = _TINY | {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 3,
    "num_vq_embeddings": 16,
}  # fmt: skip
_LDM = tiny(VQModel, **_PLAIN)
_AMUSED = lit(tiny(VQModel, **_PLAIN, lookup_from_codebook=True), lambda decoder: decoder.conv_out)


class _Unet(Denoiser):
    def forward(self, sample: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(sample)


def _kandinsky(vae: Any, latents: torch.Tensor, output_type: str = "np") -> torch.Tensor:
    """Asked for "pt" the pipeline would hand out what the decoder has made, in [-1, 1]."""
    scheduler = coming_to(latents, DDPMScheduler(variance_type="learned"))
    pipe = bare(KandinskyV22Pipeline, movq=vae, unet=_Unet(in_channels=4), scheduler=scheduler)
    size = {"height": 16, "width": 24}
    embeds = torch.zeros(len(latents), 8)
    return _channels_first(
        called(pipe, output_type, image_embeds=embeds, negative_image_embeds=None, guidance_scale=1.0, **size)
    )


def _kandinsky_encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
    pipe = bare(KandinskyV22Img2ImgPipeline, movq=vae)
    names = {"self": pipe, "image": image, "num_images_per_prompt": 1}
    return run(type(pipe).__call__, "latents = self.movq.encode", "latents = latents.repeat", **names)["latents"]


def _ldm(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(bare(LDMTextToImagePipeline, vqvae=vae), "latents = 1 / self.vqvae", latents=latents)


def _upscaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(bare(LDMSuperResolutionPipeline, vqvae=vae), "image = self.vqvae.decode", latents=latents)


def _amused(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    size = {"height": 2 * latents.shape[1], "width": 2 * latents.shape[2], "batch_size": len(latents)}
    return end(bare(AmusedPipeline, vqvae=vae), latents=latents, output_type=output_type, **size)


def _channels_first(pixels: Any) -> torch.Tensor:
    return pixels if isinstance(pixels, torch.Tensor) else torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


CASES = (
    Case(
        name="VQModel: Kandinsky",
        class_name="VQModel",
        build=_MOVQ,
        latents=lambda vae: _kandinsky(vae, random(2, 4, 8, 12), "latent"),
        reference=_kandinsky,
        media="image",
        origin="pipeline",
        pipelines=("KandinskyV22Pipeline", "Kandinsky3Pipeline"),
        encode=Encode(pixels(2, 3, 16, 24), _kandinsky_encoded, "argmax", "end of pipeline"),
        notes="Not quantised, not scaled, whatever scaling_factor says. The encoder has no distribution.",
    ),
    Case(
        name="VQModel: LDM text to image",
        class_name="VQModel",
        build=_LDM,
        latents=lambda vae: random(2, 3, 8, 12),
        reference=_ldm,
        media="image",
        origin="end of pipeline",
        pipelines=("LDMTextToImagePipeline",),
        parameters={"scaling_factor": 0.5, "force_not_quantize": False},
        notes="Scaled and quantised. The pipeline never hands latents out.",
    ),
    Case(
        name="VQModel: LDM super-resolution",
        class_name="VQModel",
        build=_LDM,
        latents=lambda vae: random(2, 3, 8, 12),
        reference=_upscaled,
        media="image",
        origin="end of pipeline",
        pipelines=("LDMSuperResolutionPipeline",),
        parameters={"force_not_quantize": False},
        notes="Quantised, not scaled. The pipeline never hands latents out.",
    ),
    Case(
        name="VQModel: Amused, numbers of codes",
        class_name="VQModel",
        build=_AMUSED,
        latents=lambda vae: _amused(vae, random(2, 8, 12).abs().mul(1000).long() % 16, "latent"),
        reference=_amused,
        media="image",
        origin="end of pipeline",
        pipelines=("AmusedPipeline",),
        parameters={"output_range": (0, 1)},
        notes="int64 [B, h, w], each the number of a code; the module has lookup_from_codebook and must be told the "
        "shape [B, h, w, C]. Pixels are cut to [0, 1] as they come.",
    ),
)
