"""Cosmos, which scales by what its scheduler says, MiniMax-H3, whose pixels are ImageNet's, and what no pipeline uses."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLKVAEVideo,
    AutoencoderKLMiniMaxH3,
    AutoencoderVidTok,
    CosmosTextToWorldPipeline,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
)
from diffusers.modular_pipelines.minimax_h3.decoders import MiniMaxH3VideoDecodeStep
from diffusers.modular_pipelines.minimax_h3.encoders import encode_vae_condition
from diffusers.video_processor import VideoProcessor

from families.case import Case, Encode
from families.ends import bare, end
from families.video_pipelines import SEED, Denoiser, generator, pixels, random, statistics, tiny

_SIGMA_DATA = 0.7
_COSMOS_CONFIG: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "encoder_block_out_channels": (8, 8, 8, 8),
    "decode_block_out_channels": (8, 8, 8, 8), "attention_resolutions": (8,), "resolution": 64, "num_layers": 2,
    "patch_size": 4, "patch_type": "haar", "scaling_factor": 1.0, "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 4,
}  # fmt: skip
_FRAME_MEAN, _FRAME_STD = statistics(4 * 16)
_COSMOS = tiny(AutoencoderKLCosmos, latents_mean=_FRAME_MEAN, latents_std=_FRAME_STD, **_COSMOS_CONFIG)
_COSMOS_BARE = tiny(AutoencoderKLCosmos, latents_mean=None, latents_std=None, **_COSMOS_CONFIG)
_MEAN, _STD = statistics(4)
_MINIMAX = tiny(
    AutoencoderKLMiniMaxH3, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16),
    layers_per_block=1, spatial_downsample_factors=(2, 2), temporal_downsample_factors=(2, 2), norm_num_groups=8,
    decoder_num_layers=2, decoder_num_attention_heads=2, decoder_attention_head_dim=8, decoder_num_register_tokens=2,
    decoder_ffn_mult=2, clip_length=17, token_drop=3, latents_mean=_MEAN, latents_std=_STD,
)  # fmt: skip
_KVAE = tiny(
    AutoencoderKLKVAEVideo, ch=32, ch_mult=(1, 2), num_res_blocks=1, in_channels=3, out_ch=3, z_channels=4,
    temporal_compress_times=2,
)  # fmt: skip
_VIDTOK_CONFIG: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1,
}  # fmt: skip
_VIDTOK_FSQ = tiny(
    AutoencoderVidTok, is_causal=False, z_channels=6, double_z=False, regularizer="fsq", codebook_size=262144,
    **_VIDTOK_CONFIG,
)  # fmt: skip
_VIDTOK_KL = tiny(AutoencoderVidTok, is_causal=True, z_channels=4, double_z=True, regularizer="kl", **_VIDTOK_CONFIG)


def _cosmos_pipe(pipeline: Any, vae: Any) -> Any:
    """Without the checker of what is shown, which is not diffusers' own and must be downloaded."""
    scheduler = EDMEulerScheduler(sigma_data=_SIGMA_DATA)
    pipe = bare(pipeline, vae=vae, scheduler=scheduler, safety_checker=Denoiser())
    pipe.safety_checker = None
    return pipe


def _cosmos(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(_cosmos_pipe(CosmosTextToWorldPipeline, vae), latents=latents)


def _cosmos_encoded(vae: Any, video: torch.Tensor) -> torch.Tensor:
    batch, _, frames, height, width = video.shape
    size = {"height": height, "width": width, "num_frames": frames}
    pipe = _cosmos_pipe(CosmosVideoToWorldPipeline, vae)
    return pipe.prepare_latents(video, batch, 4, dtype=torch.float32, generator=generator(), **size)[1]


def _minimax(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pipe = MiniMaxH3VideoDecodeStep().init_pipeline()
    pipe.update_components(vae=vae)
    return pipe(latents=latents, output_type="pt", output="videos")


def _minimax_encoded(vae: Any, video: torch.Tensor) -> torch.Tensor:
    pipe = MiniMaxH3VideoDecodeStep().init_pipeline()
    whole = ((video + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        return encode_vae_condition(vae, whole, pipe.pixel_mean, pipe.pixel_std, SEED)


def _bytes(*shape: int) -> torch.Tensor:
    """Pixels in [-1, 1] that are whole numbers of 255."""
    return torch.randint(0, 256, shape, generator=generator()) / 127.5 - 1


def _module(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        decoded = vae.decode(latents)
    return VideoProcessor().postprocess_video(decoded if torch.is_tensor(decoded) else decoded.sample, "pt")


CASES = (
    Case(
        name="AutoencoderKLCosmos",
        class_name="AutoencoderKLCosmos",
        build=_COSMOS,
        latents=lambda vae: random(2, 4, 2, 4, 4),
        reference=_cosmos,
        media="video",
        origin="end of pipeline",
        pipelines=("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"),
        parameters={"sigma_data": _SIGMA_DATA},
        encode=Encode(pixels(1, 3, 5, 16, 16), _cosmos_encoded, "sample", "end of pipeline", SEED),
        notes="A mean and a deviation for each channel of each of the first 16 frames.",
    ),
    Case(
        name="AutoencoderKLCosmos: without statistics",
        class_name="AutoencoderKLCosmos",
        build=_COSMOS_BARE,
        latents=lambda vae: random(2, 4, 2, 4, 4),
        reference=_cosmos,
        media="video",
        origin="end of pipeline",
        pipelines=("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"),
        parameters={"sigma_data": _SIGMA_DATA},
        encode=Encode(pixels(1, 3, 5, 16, 16), _cosmos_encoded, "sample", "end of pipeline", SEED),
    ),
    Case(
        name="AutoencoderKLMiniMaxH3",
        class_name="AutoencoderKLMiniMaxH3",
        build=_MINIMAX,
        latents=lambda vae: random(2, 4, 7, 2, 3),
        reference=_minimax,
        media="video",
        origin="end of pipeline",
        pipelines=("MiniMaxH3ModularPipeline",),
        encode=Encode(lambda: _bytes(1, 3, 22, 8, 8), _minimax_encoded, "sample", "end of pipeline", SEED),
        notes="Pixels in ImageNet's normalisation. The pipeline's own seed is 42, and it rounds the draw to float16.",
    ),
    Case(
        name="AutoencoderKLKVAEVideo",
        class_name="AutoencoderKLKVAEVideo",
        build=_KVAE,
        latents=lambda vae: random(2, 4, 2, 4, 4),
        reference=_module,
        media="video",
        origin="module",
    ),
    Case(
        name="AutoencoderVidTok: fsq",
        class_name="AutoencoderVidTok",
        build=_VIDTOK_FSQ,
        latents=lambda vae: random(1, 6, 4, 2, 2),
        reference=_module,
        media="video",
        origin="module",
        notes="decode answers with a tensor.",
    ),
    Case(
        name="AutoencoderVidTok: kl, causal",
        class_name="AutoencoderVidTok",
        build=_VIDTOK_KL,
        latents=lambda vae: random(2, 4, 2, 2, 2),
        reference=_module,
        media="video",
        origin="module",
        notes="decode answers with a tensor.",
    ),
)
