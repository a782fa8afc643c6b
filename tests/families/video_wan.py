"""AutoencoderKLWan: one normalisation, which Cosmos scales, VACE cuts, Bria packs and JoyImage stacks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    BriaFiboPipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    WanPipeline,
    WanVACEPipeline,
    WanVideoToVideoPipeline,
)

from families.case import Case, Encode
from families.ends import bare, end
from families.video_pipelines import (
    Denoiser,
    called,
    ending,
    generator,
    keeping,
    pixels,
    random,
    statistics,
    tiny,
    words,
)

_MEAN, _STD = statistics(16)
_MEAN_48, _STD_48 = statistics(48)
_WAN = tiny(
    AutoencoderKLWan, base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
    temperal_downsample=[False, True, True], latents_mean=_MEAN, latents_std=_STD,
)  # fmt: skip
_WAN_5B = tiny(
    AutoencoderKLWan, base_dim=4, decoder_base_dim=8, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
    temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2,
    scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=_MEAN_48, latents_std=_STD_48,
)  # fmt: skip


def _wan(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    batch, channels, frames, height, width = latents.shape
    ratio = vae.config.scale_factor_spatial
    transformer = Denoiser(in_channels=channels, patch_size=(1, 2, 2))
    pipe = bare(WanPipeline, vae=vae, scheduler=ending(latents), transformer=transformer, expand_timesteps=ratio == 16)
    size = {"height": height * ratio, "width": width * ratio, "num_frames": (frames - 1) * 4 + 1}
    return called(pipe, output_type, prompt_embeds=words(batch), guidance_scale=1.0, **size)


def _wan_encoded(vae: Any, video: torch.Tensor) -> torch.Tensor:
    pipe = bare(WanVideoToVideoPipeline, vae=vae, scheduler=keeping())
    shape = {"batch_size": video.shape[0], "height": video.shape[3], "width": video.shape[4]}
    return pipe.prepare_latents(
        video, num_channels_latents=vae.config.z_dim, dtype=torch.float32, generator=generator(), **shape
    )


def _cosmos(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Without the checker of what is shown, which is not diffusers' own and must be downloaded."""
    pipe = _cosmos_pipe(Cosmos2VideoToWorldPipeline, vae)
    return end(pipe, latents=latents)


def _cosmos_image(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(_cosmos_pipe(Cosmos2TextToImagePipeline, vae), latents=latents)


def _cosmos_encoded(vae: Any, video: torch.Tensor) -> torch.Tensor:
    batch, _, frames, height, width = video.shape
    size = {"height": height, "width": width, "num_frames": frames}
    pipe = _cosmos_pipe(Cosmos2VideoToWorldPipeline, vae)
    prepared = pipe.prepare_latents(video, batch, vae.config.z_dim, dtype=torch.float32, generator=generator(), **size)
    return prepared[1]


def _cosmos_pipe(pipeline: Any, vae: Any) -> Any:
    pipe = bare(pipeline, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), safety_checker=Denoiser())
    pipe.safety_checker = None
    # The constructor registers 1.0, with which a division cannot be told from none.
    pipe.scheduler.register_to_config(sigma_data=_SIGMA_DATA)
    return pipe


_SIGMA_DATA = 0.5


def _vace(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pipe = bare(WanVACEPipeline, vae=vae)
    return end(pipe, latents=latents, num_reference_images=1, vae_dtype=vae.dtype)


def _fibo(vae: Any, latents: torch.Tensor, patched: bool) -> torch.Tensor:
    return end(bare(BriaFiboPipeline, vae=vae), latents=latents, height=64, width=96, do_patching=patched)


def _joy(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    """From the one item of each sample that the pipeline hands out, back to its `[B, items, C, T, h, w]`."""
    names = {"batch_size": len(latents), "num_images_per_prompt": 1, "enable_denormalization": True}
    return end(
        bare(JoyImageEditPipeline, vae=vae), "if output_type != 'latent'", latents=latents[:, None, :, None],
        output_type=output_type, **names,
    )  # fmt: skip


def _joy_plus(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The tokens of the picture come first; those of the pictures that it was made from follow."""
    pipe = bare(JoyImageEditPlusPipeline, vae=vae, transformer=Denoiser(patch_size=(1, 2, 2)))
    batch, tokens = latents.shape[:2]
    everything = torch.ones(batch, tokens, dtype=torch.bool)
    names = {"batch_size": batch, "target_mask": everything, "clean_reference_backup": latents}
    shapes = [[(1, 2, 3)]] * batch
    return end(pipe, "if output_type != 'latent'", latents=latents.clone(), shape_list=shapes, **names)


_VIDEO = (2, 16, 2, 4, 4)
_WAN_ENCODE = Encode(pixels(2, 3, 5, 32, 32), _wan_encoded, "argmax", "end of pipeline")

CASES = (
    Case(
        name="AutoencoderKLWan",
        class_name="AutoencoderKLWan",
        build=_WAN,
        latents=lambda vae: _wan(vae, random(*_VIDEO), "latent"),
        reference=_wan,
        media="video",
        origin="pipeline",
        pipelines=(
            "WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "SkyReelsV2Pipeline",
            "LucyEditPipeline", "AnyFlowPipeline", "MotifVideoPipeline", "Cosmos2_5_PredictBasePipeline",
            "Cosmos3OmniPipeline", "SanaVideoPipeline",
        ),
        encode=_WAN_ENCODE,
    ),
    Case(
        name="AutoencoderKLWan: 2.2 5B",
        class_name="AutoencoderKLWan",
        build=_WAN_5B,
        latents=lambda vae: _wan(vae, random(2, 48, 2, 2, 2), "latent"),
        reference=_wan,
        media="video",
        origin="pipeline",
        pipelines=("WanPipeline", "WanImageToVideoPipeline"),
        encode=Encode(pixels(2, 3, 5, 32, 32), _wan_encoded, "argmax", "end of pipeline"),
    ),
    Case(
        name="AutoencoderKLWan: Cosmos 2",
        class_name="AutoencoderKLWan",
        build=_WAN,
        latents=lambda vae: random(*_VIDEO),
        reference=_cosmos,
        media="video",
        origin="end of pipeline",
        pipelines=("Cosmos2VideoToWorldPipeline",),
        parameters={"sigma_data": _SIGMA_DATA},
        encode=Encode(pixels(1, 3, 5, 32, 32), _cosmos_encoded, "sample", "end of pipeline", generator().initial_seed()),
        notes="The pipeline itself registers sigma_data 1.0 in whatever scheduler it is given.",
    ),
    Case(
        name="AutoencoderKLWan: Cosmos 2 image",
        class_name="AutoencoderKLWan",
        build=_WAN,
        latents=lambda vae: random(2, 16, 1, 4, 4),
        reference=_cosmos_image,
        media="image",
        origin="end of pipeline",
        pipelines=("Cosmos2TextToImagePipeline",),
        parameters={"sigma_data": _SIGMA_DATA},
    ),
    Case(
        name="AutoencoderKLWan: VACE",
        class_name="AutoencoderKLWan",
        build=_WAN,
        latents=lambda vae: random(1, 16, 3, 4, 4),
        reference=_vace,
        media="video",
        origin="end of pipeline",
        pipelines=("WanVACEPipeline",),
        parameters={"num_reference_images": 1},
        notes="The latents handed out begin with one frame for each reference image; the video does not.",
    ),
    Case(
        name="AutoencoderKLWan: FIBO",
        class_name="AutoencoderKLWan",
        build=_WAN_5B,
        latents=lambda vae: random(2, 4 * 6, 48),
        reference=lambda vae, latents: _fibo(vae, latents, False),
        media="image",
        origin="end of pipeline",
        pipelines=("BriaFiboPipeline", "BriaFiboEditPipeline"),
        parameters={"height": 64, "width": 96},
    ),
    Case(
        name="AutoencoderKLWan: FIBO, patched",
        class_name="AutoencoderKLWan",
        build=_WAN_5B,
        latents=lambda vae: random(2, 2 * 3, 4 * 48),
        reference=lambda vae, latents: _fibo(vae, latents, True),
        media="image",
        origin="end of pipeline",
        pipelines=("BriaFiboPipeline", "BriaFiboEditPipeline"),
        parameters={"height": 64, "width": 96},
        notes="do_patching=True: the tokens' width is four times the channels.",
    ),
    Case(
        name="AutoencoderKLWan: JoyImage",
        class_name="AutoencoderKLWan",
        build=_WAN,
        latents=lambda vae: _joy(vae, random(2, 16, 4, 4), "latent"),
        reference=_joy,
        media="image",
        origin="end of pipeline",
        pipelines=("JoyImageEditPipeline",),
        notes="Inside the pipeline the latents are 6-D; what it hands out is the last item without its frame axis.",
    ),
    Case(
        name="AutoencoderKLWan: JoyImage Plus",
        class_name="AutoencoderKLWan",
        build=_WAN,
        latents=lambda vae: random(2, 2 * 3 + 4, 16, 1, 2, 2),
        reference=_joy_plus,
        media="image",
        origin="end of pipeline",
        pipelines=("JoyImageEditPlusPipeline",),
        parameters={"height": 32, "width": 48},
        notes="Tokens `[B, S, C, 1, 2, 2]`, the picture's first; the others are of pictures it was made from.",
    ),
)  # fmt: skip
