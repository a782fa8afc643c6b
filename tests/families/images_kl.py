"""AutoencoderKL: one class with eight conventions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    AutoencoderKL,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    GlmImagePipeline,
    Kandinsky5I2IPipeline,
    Kandinsky5T2IPipeline,
    LattePipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from families.case import Case, Encode
from families.ends import bare, end
from families.images_made import SIZE, coming_to, of_transformer, of_unet, without_noise
from families.video_pipelines import SEED, Denoiser, called, generator, keeping, pixels, random, statistics, tiny, words

_BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 2, "sample_size": 64,
}  # fmt: skip
_SIXTEEN: dict[str, Any] = _BLOCKS | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_MEAN_4, _STD_4 = statistics(4)
_MEAN_16, _STD_16 = statistics(16)
_GLM_CONFIG = {"in_channels": 16, "patch_size": 2, "sample_size": 8, "num_layers": 1}
_SD = tiny(AutoencoderKL, **_BLOCKS, scaling_factor=0.18215)
_SDXL = tiny(AutoencoderKL, **_BLOCKS, scaling_factor=0.13025)
_PLAYGROUND = tiny(AutoencoderKL, **_BLOCKS, scaling_factor=0.5, latents_mean=_MEAN_4, latents_std=_STD_4)
_SD3 = tiny(AutoencoderKL, **_SIXTEEN, scaling_factor=1.5305, shift_factor=0.609)
_FLUX = tiny(AutoencoderKL, **_SIXTEEN, scaling_factor=0.3611, shift_factor=0.1159)
_GLM = tiny(AutoencoderKL, **_SIXTEEN, scaling_factor=0.18215, latents_mean=_MEAN_16, latents_std=_STD_16)


def _sd(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    return of_unet(StableDiffusionPipeline, vae, latents, output_type)


def _sdxl(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    pooled = torch.zeros(len(latents), 8)
    return of_unet(StableDiffusionXLPipeline, vae, latents, output_type, pooled_prompt_embeds=pooled)


def _sd3(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    config = {"in_channels": 16, "patch_size": 2, "sample_size": 8, "joint_attention_dim": 8}
    pooled = torch.zeros(len(latents), 8)
    return of_transformer(StableDiffusion3Pipeline, vae, latents, output_type, config, pooled_prompt_embeds=pooled)


def _flux(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    config = {"in_channels": 64, "guidance_embeds": False}
    pooled = torch.zeros(len(latents), 8)
    return of_transformer(FluxPipeline, vae, latents, output_type, config, pooled_prompt_embeds=pooled)


def _glm(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    given = {"prior_token_ids": torch.zeros(len(latents), 1, dtype=torch.int64)}
    return of_transformer(GlmImagePipeline, vae, latents, output_type, _GLM_CONFIG, **given)


def _kandinsky(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    size = {"height": 32, "width": 48, "batch_size": len(latents), "num_channels_latents": 16}
    pipe = bare(Kandinsky5T2IPipeline, vae=vae)
    return end(pipe, "latents[:, :, :, :, :num_channels_latents]", latents=latents, output_type=output_type, **size)


def _kandinsky_encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
    """`[B, 1, h, w, C]`, which the pipeline puts between the noise and a mask."""
    pipe = bare(Kandinsky5I2IPipeline, vae=vae)
    size = {"batch_size": len(image), "num_channels_latents": 16, "height": 32, "width": 48}
    names = {"dtype": torch.float32, "device": "cpu", "generator": generator()}
    # It takes pixels in [0, 1].
    return pipe.prepare_latents(image / 2 + 0.5, **size, **names)[..., 16:32]


def _animatediff(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    return of_unet(AnimateDiffPipeline, vae, latents, output_type, num_frames=latents.shape[2])


def _latte(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    names = {"video_length": latents.shape[2], "decode_chunk_size": 14, "output_type": output_type}
    return end(bare(LattePipeline, vae=vae), latents=latents, **names)


def _animatediff_encoded(vae: Any, video: torch.Tensor) -> torch.Tensor:
    pipe = bare(AnimateDiffVideoToVideoPipeline, vae=vae, scheduler=keeping())
    names = {"batch_size": len(video), "dtype": torch.float32, "device": "cpu", "generator": generator()}
    with torch.no_grad():
        return pipe.prepare_latents(video.transpose(1, 2), **SIZE, **names)


def _img2img(pipeline: Any, **arguments: Any) -> Encode:
    def encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
        return without_noise(pipeline, vae, image, **arguments)

    return Encode(pixels(2, 3, 32, 48), encoded, "sample", "end of pipeline", SEED)


def _flux_encoded(pipeline: Any) -> Any:
    def encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return bare(pipeline, vae=vae)._encode_vae_image(image, generator())

    return encoded


def _glm_encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
    """Of one image: what the pipeline shows its transformer of the image before it denoises."""
    shown: list[torch.Tensor] = []
    pipe = bare(
        GlmImagePipeline, vae=vae, scheduler=coming_to(torch.zeros(1, 16, 4, 6)), transformer=Denoiser(**_GLM_CONFIG)
    )
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shown.append(kwargs["hidden_states"]), with_kwargs=True
    )
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    priors = {"prior_token_ids": tokens, "prior_token_image_ids": [tokens[0]], "source_image_grid_thw": [tokens + 1]}
    picture = image[0].permute(1, 2, 0).div(2).add(0.5).numpy()
    called(pipe, "latent", image=[picture], prompt_embeds=words(1), guidance_scale=1.0, **priors, **SIZE)
    return shown[0]


_LIKE_SD = (
    "StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline",
    "PixArtAlphaPipeline", "PixArtSigmaPipeline", "HunyuanDiTPipeline", "LuminaPipeline", "AuraFlowPipeline",
    "CogView3PlusPipeline", "CogView4Pipeline",
)  # fmt: skip
_LIKE_SD3 = (
    "StableDiffusion3Pipeline", "HiDreamImagePipeline", "Lumina2Pipeline", "ZImagePipeline", "PRXPipeline",
)  # fmt: skip
_PACKED = (
    "FluxPipeline", "FluxFillPipeline", "FluxKontextPipeline", "FluxControlPipeline", "ChromaPipeline",
    "BriaPipeline", "LongCatImagePipeline", "OvisImagePipeline",
)  # fmt: skip
CASES = (
    Case(
        name="AutoencoderKL: Stable Diffusion",
        class_name="AutoencoderKL",
        build=_SD,
        latents=lambda vae: _sd(vae, random(2, 4, 4, 6), "latent"),
        reference=_sd,
        media="image",
        origin="pipeline",
        pipelines=_LIKE_SD,
        encode=_img2img(StableDiffusionImg2ImgPipeline),
    ),
    Case(
        name="AutoencoderKL: SDXL",
        class_name="AutoencoderKL",
        build=_SDXL,
        latents=lambda vae: _sdxl(vae, random(2, 4, 4, 6), "latent"),
        reference=_sdxl,
        media="image",
        origin="pipeline",
        pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"),
        encode=_img2img(StableDiffusionXLImg2ImgPipeline, add_noise=False),
        notes="force_upcast: the pipeline decodes in float32 where the VAE is in float16.",
    ),
    Case(
        name="AutoencoderKL: SDXL with statistics",
        class_name="AutoencoderKL",
        build=_PLAYGROUND,
        latents=lambda vae: _sdxl(vae, random(2, 4, 4, 6), "latent"),
        reference=_sdxl,
        media="image",
        origin="pipeline",
        pipelines=("StableDiffusionXLPipeline",),
        encode=_img2img(StableDiffusionXLImg2ImgPipeline, add_noise=False),
        notes="Playground v2.5: statistics and scaling_factor together.",
    ),
    Case(
        name="AutoencoderKL: Stable Diffusion 3",
        class_name="AutoencoderKL",
        build=_SD3,
        latents=lambda vae: _sd3(vae, random(2, 16, 4, 6), "latent"),
        reference=_sd3,
        media="image",
        origin="pipeline",
        pipelines=_LIKE_SD3,
        encode=_img2img(StableDiffusion3Img2ImgPipeline),
    ),
    Case(
        name="AutoencoderKL: Flux, packed",
        class_name="AutoencoderKL",
        build=_FLUX,
        latents=lambda vae: _flux(vae, random(2, 6, 64), "latent"),
        reference=_flux,
        media="image",
        origin="pipeline",
        pipelines=_PACKED,
        parameters=SIZE,
        encode=Encode(pixels(2, 3, 32, 48), _flux_encoded(FluxImg2ImgPipeline), "sample", "end of pipeline", SEED),
    ),
    Case(
        name="AutoencoderKL: Flux Kontext, packed",
        class_name="AutoencoderKL",
        build=_FLUX,
        latents=lambda vae: random(1, 6, 64),
        reference=lambda vae, latents: end(bare(FluxKontextPipeline, vae=vae), latents=latents, **SIZE),
        media="image",
        origin="end of pipeline",
        pipelines=("FluxKontextPipeline",),
        parameters=SIZE,
        encode=Encode(pixels(1, 3, 32, 48), _flux_encoded(FluxKontextPipeline), "argmax", "end of pipeline"),
        notes="Decodes as the other does, but encodes what it edits by the mode.",
    ),
    Case(
        name="AutoencoderKL: GLM-Image",
        class_name="AutoencoderKL",
        build=_GLM,
        latents=lambda vae: _glm(vae, random(2, 16, 4, 6), "latent"),
        reference=_glm,
        media="image",
        origin="pipeline",
        pipelines=("GlmImagePipeline",),
        parameters={"scaling_factor": 1.0},
        encode=Encode(pixels(1, 3, 32, 48), _glm_encoded, "argmax", "pipeline"),
        notes="Statistics, but the config's scaling_factor is not looked at.",
    ),
    Case(
        name="AutoencoderKL: Kandinsky 5, channels last",
        class_name="AutoencoderKL",
        build=_FLUX,
        latents=lambda vae: _kandinsky(vae, random(2, 1, 4, 6, 16), "latent"),
        reference=_kandinsky,
        media="image",
        origin="end of pipeline",
        pipelines=("Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"),
        parameters={"shift_factor": 0.0, "layout": "channels last"},
        encode=Encode(pixels(2, 3, 32, 48), _kandinsky_encoded, "sample", "end of pipeline", SEED),
        notes="Flux's VAE without its shift_factor. Encoded latents are [B, 1, h, w, C] too.",
    ),
    Case(
        name="AutoencoderKL: AnimateDiff, frames folded into the batch",
        class_name="AutoencoderKL",
        build=_SD,
        latents=lambda vae: _animatediff(vae, random(2, 4, 3, 4, 6), "latent"),
        reference=_animatediff,
        media="video",
        origin="pipeline",
        pipelines=("AnimateDiffPipeline", "AnimateDiffSDXLPipeline"),
        encode=Encode(pixels(2, 3, 3, 32, 48), _animatediff_encoded, "sample", "end of pipeline", SEED),
        notes="Encoding draws the frames of one video at a time from one generator.",
    ),
    Case(
        name="AutoencoderKL: Latte, frames folded into the batch",
        class_name="AutoencoderKL",
        build=_SD,
        latents=lambda vae: _latte(vae, random(2, 4, 3, 4, 6), "latent"),
        reference=_latte,
        media="video",
        origin="end of pipeline",
        pipelines=("LattePipeline",),
    ),
)
