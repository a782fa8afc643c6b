"""The image autoencoders with one convention each: drop-ins for Stable Diffusion's, DC-AE, KVAE and RAE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKLKVAE,
    AutoencoderRAE,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    DreamLitePipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.image_processor import VaeImageProcessor

from families.case import Case, Encode
from families.ends import bare, end
from families.images_made import SIZE, lit, of_transformer, of_unet, whole, without_noise
from families.video_pipelines import SEED, generator, pixels, random, statistics, tiny

_ASYMMETRIC = tiny(
    AsymmetricAutoencoderKL, down_block_types=("DownEncoderBlock2D",) * 4, down_block_out_channels=(4, 4, 4, 4),
    up_block_types=("UpDecoderBlock2D",) * 4, up_block_out_channels=(4, 8, 16, 32), norm_num_groups=2, sample_size=64,
    scaling_factor=0.18215,
)  # fmt: skip
_TAE: dict[str, Any] = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
_TAESD = lit(tiny(AutoencoderTiny, loudness=1.6, **_TAE, scaling_factor=0.7), lambda decoder: decoder.layers[-1])
_TAEF1 = lit(
    tiny(AutoencoderTiny, loudness=1.6, **_TAE, latent_channels=16, scaling_factor=0.7, shift_factor=0.2),
    lambda decoder: decoder.layers[-1],
)
_DC = tiny(
    AutoencoderDC, latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8),
    encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
    decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
    encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
    upsample_block_type="interpolate", scaling_factor=0.41407,
)  # fmt: skip
_CONSISTENCY = tiny(
    ConsistencyDecoderVAE, encoder_block_out_channels=(2, 4, 4, 4), decoder_add_attention=False,
    decoder_block_out_channels=(4, 4, 4, 4), decoder_norm_num_groups=2, encoder_norm_num_groups=2,
    decoder_layers_per_block=1, encoder_layers_per_block=1, scaling_factor=0.18215,
)  # fmt: skip
_KVAE = tiny(
    AutoencoderKLKVAE, channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 2), sample_size=32
)  # fmt: skip
_MEAN, _STD = statistics(64)
_RAE_TINY: dict[str, Any] = {
    "encoder_hidden_size": 64, "encoder_patch_size": 8, "encoder_num_hidden_layers": 1, "encoder_input_size": 32,
    "patch_size": 4, "image_size": 16, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64, "scaling_factor": 0.8,
}  # fmt: skip


def _sd(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    return of_unet(StableDiffusionPipeline, vae, latents, output_type)


def _inpainted(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pipe = whole(StableDiffusionInpaintPipeline, vae=vae)
    names = {"init_image": _PICTURE, "mask_condition": _MASK, "masked_image_latents": latents, "device": "cpu"}
    embeds = torch.zeros(len(latents), 1, 8)
    return end(pipe, latents=latents, generator=generator(), prompt_embeds=embeds, **names)


def _flux(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    config = {"in_channels": 64, "guidance_embeds": False}
    pooled = torch.zeros(len(latents), 8)
    return of_transformer(FluxPipeline, vae, latents, output_type, config, pooled_prompt_embeds=pooled)


def _dreamlite(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    return end(bare(DreamLitePipeline, vae=vae), latents=latents, output_type=output_type)


def _sana(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    config = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "timestep_scale": 1.0}
    mask = torch.ones(len(latents), 1)
    given = {"prompt_attention_mask": mask, "use_resolution_binning": False, "height": 32, "width": 64}
    return of_transformer(SanaPipeline, vae, latents, output_type, config, **given)


def _consistency(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    """A whole call would draw the latents that it denoises before the noise of the decoder."""
    pipe = whole(StableDiffusionPipeline, vae=vae)
    names = {"prompt_embeds": torch.zeros(1), "device": "cpu", "generator": generator()}
    return end(pipe, latents=latents, output_type=output_type, **names)


def _alone(in_range: bool) -> Any:
    """No pipeline has the class: the module, and the image processor with or without a way from [-1, 1] to [0, 1]."""

    def reference(vae: Any, latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            decoded = vae.decode(latents, return_dict=False)[0]
        return VaeImageProcessor().postprocess(decoded, "pt", do_denormalize=[not in_range] * len(decoded))

    return reference


def _rae(shape: tuple[int, ...], **config: Any) -> Any:
    """Its statistics have the shape in which it multiplies with them."""
    mean, std = (torch.tensor(values).reshape(shape).tolist() for values in (_MEAN, _STD))
    return tiny(AutoencoderRAE, **_RAE_TINY, **config, latents_mean=mean, latents_std=std)


def _encoded_like_sd(mode: Any) -> Encode:
    def encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
        return without_noise(StableDiffusionImg2ImgPipeline, vae, image)

    return Encode(pixels(2, 3, 32, 48), encoded, mode, "end of pipeline", SEED if mode == "sample" else None)


def _flux_encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return bare(FluxImg2ImgPipeline, vae=vae)._encode_vae_image(image, generator())


def _dreamlite_encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return bare(DreamLitePipeline, vae=vae).prepare_image_latents(image, torch.float32, "cpu")


def _sprint_encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
    """At the time without noise; the scheduler's sigma_data, which its `step` takes away again, is one."""
    pipe = bare(SanaSprintImg2ImgPipeline, vae=vae, scheduler=SCMScheduler(sigma_data=1.0))
    shape = {"batch_size": len(image), "num_channels_latents": 4, "height": 32, "width": 64}
    names = {"timestep": torch.tensor(0.0), "dtype": torch.float32, "device": "cpu", "generator": generator()}
    with torch.no_grad():
        return pipe.prepare_latents(image, **shape, **names)


_PICTURE = pixels(2, 3, 32, 48)()
_MASK = (random(2, 1, 32, 48) > 0).float()

CASES = (
    Case(
        name="AsymmetricAutoencoderKL",
        class_name="AsymmetricAutoencoderKL",
        build=_ASYMMETRIC,
        latents=lambda vae: _sd(vae, random(2, 4, 4, 6), "latent"),
        reference=_sd,
        media="image",
        origin="pipeline",
        pipelines=("StableDiffusionPipeline",),
        encode=_encoded_like_sd("sample"),
    ),
    Case(
        name="AsymmetricAutoencoderKL: with the picture around the mask",
        class_name="AsymmetricAutoencoderKL",
        build=_ASYMMETRIC,
        latents=lambda vae: random(2, 4, 4, 6),
        reference=_inpainted,
        media="image",
        origin="end of pipeline",
        pipelines=("StableDiffusionInpaintPipeline",),
        parameters={"image": _PICTURE, "mask": _MASK},
        notes="image is [B, 3, H, W] in [-1, 1], mask [B, 1, H, W], 1 where the picture is new.",
    ),
    Case(
        name="AutoencoderTiny: Stable Diffusion",
        class_name="AutoencoderTiny",
        build=_TAESD,
        latents=lambda vae: _sd(vae, random(2, 4, 4, 6), "latent"),
        reference=_sd,
        media="image",
        origin="pipeline",
        pipelines=("StableDiffusionPipeline",),
        encode=_encoded_like_sd("argmax"),
        notes="Its own scaling_factor, not the large VAE's. The encoder has no distribution.",
    ),
    Case(
        name="AutoencoderTiny: Flux, packed",
        class_name="AutoencoderTiny",
        build=_TAEF1,
        latents=lambda vae: _flux(vae, random(2, 6, 64), "latent"),
        reference=_flux,
        media="image",
        origin="pipeline",
        pipelines=("FluxPipeline",),
        parameters=SIZE,
        encode=Encode(pixels(2, 3, 32, 48), _flux_encoded, "argmax", "end of pipeline"),
    ),
    Case(
        name="AutoencoderTiny: DreamLite",
        class_name="AutoencoderTiny",
        build=_TAESD,
        latents=lambda vae: _dreamlite(vae, random(1, 4, 4, 6), "latent"),
        reference=_dreamlite,
        media="image",
        origin="end of pipeline",
        pipelines=("DreamLitePipeline", "DreamLiteMobilePipeline"),
        encode=Encode(pixels(1, 3, 32, 48), _dreamlite_encoded, "argmax", "end of pipeline"),
        notes="Encoded latents are not scaled, which its own scaling_factor of 1 hides.",
    ),
    Case(
        name="AutoencoderDC",
        class_name="AutoencoderDC",
        build=_DC,
        latents=lambda vae: _sana(vae, random(2, 4, 16, 32), "latent"),
        reference=_sana,
        media="image",
        origin="pipeline",
        pipelines=("SanaPipeline", "SanaSprintPipeline", "SanaControlNetPipeline", "PRXPipeline"),
        encode=Encode(pixels(2, 3, 32, 64), _sprint_encoded, "argmax", "end of pipeline"),
        notes="The encoder has no distribution.",
    ),
    Case(
        name="ConsistencyDecoderVAE",
        class_name="ConsistencyDecoderVAE",
        build=_CONSISTENCY,
        latents=lambda vae: _consistency(vae, random(1, 4, 4, 6), "latent"),
        reference=_consistency,
        media="image",
        origin="end of pipeline",
        pipelines=("StableDiffusionPipeline",),
        parameters={"seed": SEED},
        encode=_encoded_like_sd("sample"),
        notes="The decoder multiplies by scaling_factor what the pipeline has divided by it. It draws "
        "noise from the generator, for the whole batch at once unless it is given a list of them.",
    ),
    Case(
        name="AutoencoderKLKVAE",
        class_name="AutoencoderKLKVAE",
        build=_KVAE,
        latents=lambda vae: random(2, 4, 8, 12),
        reference=_alone(in_range=False),
        media="image",
        origin="module",
    ),
    Case(
        name="AutoencoderRAE",
        class_name="AutoencoderRAE",
        build=_rae((1, 64, 1, 1)),
        latents=lambda vae: random(2, 64, 4, 4),
        reference=_alone(in_range=True),
        media="image",
        origin="module",
        notes="The module itself denormalises, and its pixels are in [0, 1]. One size only.",
    ),
    Case(
        name="AutoencoderRAE: tokens",
        class_name="AutoencoderRAE",
        build=_rae((1, 1, 64), reshape_to_2d=False),
        latents=lambda vae: random(2, 16, 64),
        reference=_alone(in_range=True),
        media="image",
        origin="module",
        notes="With reshape_to_2d off the decoder takes [B, tokens, C]: three dimensions, not packed.",
    ),
)
