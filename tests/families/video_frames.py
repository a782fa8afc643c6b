"""CogVideoX, Mochi, Allegro, EasyAnimate and Stable Video Diffusion: one scaling each, and frames in their own places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    LattePipeline,
    MochiPipeline,
    StableVideoDiffusionPipeline,
)

from families.case import Case, Encode
from families.ends import bare, end
from families.video_pipelines import (
    SEED,
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

_MEAN, _STD = statistics(12)


def _cog_module(**config: Any) -> Callable[[], Any]:
    return tiny(
        AutoencoderKLCogVideoX, in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4, **config,
    )  # fmt: skip


_COG = _cog_module(scaling_factor=0.7)
_COG_INVERTED = _cog_module(scaling_factor=0.7, invert_scale_latents=True)
_MOCHI = tiny(
    AutoencoderKLMochi, in_channels=15, out_channels=3, latent_channels=12,
    encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
    layers_per_block=(1, 1, 1, 1, 1), scaling_factor=0.7, latents_mean=_MEAN, latents_std=_STD,
)  # fmt: skip
_MAGVIT = tiny(
    AutoencoderKLMagvit, in_channels=3, latent_channels=4, out_channels=3, block_out_channels=(8, 8, 8, 8),
    down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
    up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3, layers_per_block=1, norm_num_groups=8,
    spatial_group_norm=True, scaling_factor=0.7,
)  # fmt: skip
_ALLEGRO = tiny(
    AutoencoderKLAllegro, in_channels=3, out_channels=3, down_block_types=("AllegroDownBlock3D",) * 4,
    up_block_types=("AllegroUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
    norm_num_groups=2, temporal_compression_ratio=4, sample_size=32, scaling_factor=0.7,
)  # fmt: skip
_SVD = tiny(
    AutoencoderKLTemporalDecoder, block_out_channels=(32, 64), in_channels=3, out_channels=3,
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), latent_channels=4, layers_per_block=1,
    scaling_factor=0.7,
)  # fmt: skip


def _cog(vae: Any, latents: torch.Tensor, output_type: str = "pt", additional_frames: int = 0) -> torch.Tensor:
    batch, frames, channels, height, width = latents.shape
    patch_t = 2 if additional_frames else None
    transformer = Denoiser(
        in_channels=channels, patch_size_t=patch_t, patch_size=2, use_rotary_positional_embeddings=False
    )
    scheduler = ending(latents, CogVideoXDDIMScheduler())
    pipe = bare(CogVideoXPipeline, vae=vae, scheduler=scheduler, transformer=transformer)
    size = {"height": height * 8, "width": width * 8, "num_frames": (frames - additional_frames - 1) * 4 + 1}
    return called(pipe, output_type, prompt_embeds=words(batch), guidance_scale=1.0, **size)


def _cog_encoded(vae: Any, video: torch.Tensor) -> torch.Tensor:
    pipe = bare(CogVideoXVideoToVideoPipeline, vae=vae, scheduler=keeping(CogVideoXDDIMScheduler()))
    batch, _, _, height, width = video.shape
    return pipe.prepare_latents(video, batch, 4, height, width, torch.float32, generator=generator())


def _cog_image_encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    transformer = Denoiser(patch_size_t=None)
    pipe = bare(CogVideoXImageToVideoPipeline, vae=vae, scheduler=CogVideoXDDIMScheduler(), transformer=transformer)
    batch, _, height, width = images.shape
    return pipe.prepare_latents(images, batch, 4, 1, height, width, torch.float32, generator=generator())[1]


def _mochi(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(bare(MochiPipeline, vae=vae), latents=latents)


def _magvit(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(bare(EasyAnimatePipeline, vae=vae), latents=latents)


def _magvit_encoded(vae: Any, video: torch.Tensor) -> torch.Tensor:
    """The pipeline gives its generator to the noise alone: the latents are drawn from torch's global one."""
    pipe = bare(EasyAnimateInpaintPipeline, vae=vae, scheduler=keeping())
    batch, _, frames, height, width = video.shape
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        size = (batch, 4, height, width, frames)
        return pipe.prepare_latents(*size, torch.float32, None, None, video=video, return_video_latents=True)[-1]


def _allegro(vae: Any, latents: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
    _, _, frames, height, width = latents.shape
    size = {"height": height * 8, "width": width * 8, "num_frames": num_frames or frames * 4}
    return end(bare(AllegroPipeline, vae=vae), latents=latents, **size)


def _allegro_module() -> Any:
    vae = _ALLEGRO()
    # Without tiles it neither decodes nor encodes.
    vae.enable_tiling()
    return vae


def _svd(vae: Any, latents: torch.Tensor, decode_chunk_size: int | None = None) -> torch.Tensor:
    frames = latents.shape[1]
    chunk = {"decode_chunk_size": decode_chunk_size or frames, "num_frames": frames}
    # Without return_dict the pipeline returns the frames bare, and `end` their first.
    return end(
        bare(StableVideoDiffusionPipeline, vae=vae), latents=latents, needs_upcasting=False, return_dict=True, **chunk
    )


def _latte(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(bare(LattePipeline, vae=vae), latents=latents, video_length=latents.shape[2], decode_chunk_size=2)


def _svd_encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    pipe = bare(StableVideoDiffusionPipeline, vae=vae)
    with torch.no_grad():
        return pipe._encode_vae_image(images, images.device, 1, False)


def _case(class_name: str, build: Callable[[], Any], shape: tuple[int, ...], reference: Any, **more: Any) -> Case:
    variant = more.pop("variant", "")
    return Case(
        name=class_name + variant, class_name=class_name, build=build, latents=lambda vae: random(*shape),
        reference=reference, media="video", **{"origin": "end of pipeline"} | more,
    )  # fmt: skip


CASES = (
    Case(
        name="AutoencoderKLCogVideoX",
        class_name="AutoencoderKLCogVideoX",
        build=_COG,
        latents=lambda vae: _cog(vae, random(2, 3, 4, 2, 4), "latent"),
        reference=_cog,
        media="video",
        origin="pipeline",
        pipelines=("CogVideoXPipeline", "CogVideoXVideoToVideoPipeline", "CogVideoXFunControlPipeline", "ConsisIDPipeline"),
        encode=Encode(pixels(1, 3, 5, 16, 16), _cog_encoded, "sample", "end of pipeline", SEED),
    ),
    Case(
        name="AutoencoderKLCogVideoX: 1.5",
        class_name="AutoencoderKLCogVideoX",
        build=_COG_INVERTED,
        latents=lambda vae: _cog(vae, random(1, 4, 4, 2, 4), "latent", 1),
        reference=lambda vae, latents: _cog(vae, latents, additional_frames=1),
        media="video",
        origin="pipeline",
        pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
        parameters={"additional_frames": 1},
        encode=Encode(pixels(1, 3, 16, 16), _cog_image_encoded, "sample", "end of pipeline", SEED),
        notes="Frames of padding come first: num_frames is 9. An image is divided by the scaling factor where the config"
        " says invert_scale_latents; a video to video never is.",
    ),
    _case("AutoencoderKLMochi", _MOCHI, (2, 12, 2, 2, 3), _mochi, pipelines=("MochiPipeline",)),
    _case(
        "AutoencoderKLMagvit", _MAGVIT, (2, 4, 2, 2, 3), _magvit,
        pipelines=("EasyAnimatePipeline", "EasyAnimateInpaintPipeline"),
        encode=Encode(pixels(1, 3, 5, 16, 16), _magvit_encoded, "sample", "end of pipeline", SEED),
        notes="The module keeps features between convolutions. The pipeline's own draw is from torch's global generator.",
    ),
    _case(
        "AutoencoderKLAllegro", _allegro_module, (1, 4, 6, 4, 4), _allegro, pipelines=("AllegroPipeline",),
        notes="With enable_tiling, one sample at a time; the module puts frames before channels.",
    ),
    _case(
        "AutoencoderKLAllegro", _allegro_module, (1, 4, 6, 4, 4), lambda vae, latents: _allegro(vae, latents, 21),
        variant=": 21 frames", pipelines=("AllegroPipeline",), parameters={"num_frames": 21},
    ),
    _case(
        "AutoencoderKLTemporalDecoder", _SVD, (2, 3, 4, 4, 4), _svd, pipelines=("StableVideoDiffusionPipeline",),
        encode=Encode(pixels(2, 3, 16, 16), _svd_encoded, "argmax", "end of pipeline"),
        notes="An image is not scaled, latents are.",
    ),
    _case(
        "AutoencoderKLTemporalDecoder", _SVD, (1, 5, 4, 4, 4), lambda vae, latents: _svd(vae, latents, 2),
        variant=": in chunks", pipelines=("StableVideoDiffusionPipeline",), parameters={"decode_chunk_size": 2},
        notes="Frames of a chunk look at each other alone. The pipeline's chunks run on from one clip into the next"
        " where the batch has more than one.",
    ),
    _case(
        "AutoencoderKLTemporalDecoder", _SVD, (1, 4, 5, 4, 4), _latte, variant=": Latte", pipelines=("LattePipeline",),
        parameters={"decode_chunk_size": 2}, notes="Channels first, other than those of Stable Video Diffusion.",
    ),
)  # fmt: skip
