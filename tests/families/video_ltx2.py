"""The latents of LTX-2, which its pipelines hand out denormalized, for its autoencoder and for its diffusion decoder."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoDiffusionDecodePipeline,
    LTX2VideoDiffusionDecoderModel,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaWMPipeline,
)

from families.case import Case, Encode
from families.ends import bare, end
from families.video_pipelines import SEED, Denoiser, buffers, generator, pixels, random, statistics, tiny

_MEAN, _STD = statistics(8)
_STATISTICS = {"latents_mean": _MEAN, "latents_std": _STD}
_CONFIG: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (16, 32, 64), "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1), "spatio_temporal_scaling": (True, True, True, True),
    "decoder_spatio_temporal_scaling": (True, True, True), "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "upsample_residual": (True, True, True), "upsample_factor": (2, 2, 2), "timestep_conditioning": False,
    "patch_size": 1, "patch_size_t": 1, "encoder_causal": True, "decoder_causal": False,
    "encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "zeros",
    "spatial_compression_ratio": 8, "temporal_compression_ratio": 8,
}  # fmt: skip
_VAE = buffers(tiny(AutoencoderKLLTX2Video, scaling_factor=0.7, **_CONFIG), _STATISTICS)
_UNSCALED_VAE = buffers(tiny(AutoencoderKLLTX2Video, scaling_factor=1.0, **_CONFIG), _STATISTICS)
_DECODER = buffers(
    tiny(
        LTX2VideoDiffusionDecoderModel, out_channels=3, latent_channels=8, patch_size=2, decoder_head_dim=16,
        decoder_stage_channels=(64, 32, 16, 16, 16), decoder_stage_depths=(1, 1, 1, 1, 2),
        decoder_stage_kernels=((3, 3, 3),) * 4, decoder_upsample_strides=((1, 2, 2), (2, 1, 1), (2, 1, 1), (2, 2, 2)),
        decoder_upsample_channel_reductions=(2, 2, 1, 1), decoder_stage5_kernel=(3, 3, 3), decoder_t_emb_dim=32,
        spatial_compression_ratio=8, temporal_compression_ratio=8, scaling_factor=0.7,
    ),
    _STATISTICS,
)  # fmt: skip
_DENOISED = random(2, 8, 2, 2, 3)
"""Before the pipeline denormalises it: what it hands out cannot be turned back without a rounding."""


class _Silence(Denoiser):
    """Stands for the audio autoencoder and the vocoder, which the end of the pipeline also calls."""

    def decode(self, latents: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (latents,)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


def _ltx2(vae: Any, output_type: str) -> torch.Tensor:
    pipe = bare(LTX2Pipeline, vae=vae)
    pipe.audio_vae = pipe.vocoder = _Silence()
    names = {"latents": _DENOISED, "audio_latents": torch.zeros(1), "prompt_embeds": _DENOISED}
    return end(pipe, "if output_type == 'latent'", output_type=output_type, **names)


def _ltx2_reference(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """For the latents of this case alone."""
    assert torch.equal(latents, _ltx2(vae, "latent"))
    return _ltx2(vae, "pt")


def _encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = images.shape
    pipe = bare(LTX2ImageToVideoPipeline, vae=vae)
    size = {"height": height, "width": width, "num_frames": 1}
    tokens, _ = pipe.prepare_latents(images, batch, 8, dtype=torch.float32, generator=generator(), **size)
    ratio = pipe.vae_spatial_compression_ratio
    return pipe._unpack_latents(tokens, 1, height // ratio, width // ratio)


def _diffused(decoder: Any, latents: torch.Tensor, denormalize: bool) -> torch.Tensor:
    pipe = bare(LTX2VideoDiffusionDecodePipeline, diffusion_decoder=decoder)
    with warnings.catch_warnings():
        # Compiling is for the GPU; the tiny decoder runs eagerly.
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return pipe(latents, generator(), output_type="pt", return_dict=False, denormalize=denormalize)[0]


def _sana(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(bare(SanaVideoPipeline, vae=vae), latents=latents, use_resolution_binning=False)


def _sana_encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = images.shape
    pipe = bare(SanaImageToVideoPipeline, vae=vae)
    size = {"height": height, "width": width, "num_frames": 1}
    return pipe.prepare_latents(images, batch, 8, dtype=torch.float32, generator=generator(), **size)


def _sana_wm(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pipe = bare(SanaWMPipeline, vae=vae)
    with torch.no_grad():
        return pipe.video_processor.postprocess_video(pipe._decode_latents(latents), "pt")


_ENCODE = Encode(pixels(2, 3, 32, 32), _encoded, "argmax", "end of pipeline")

CASES = (
    Case(
        name="AutoencoderKLLTX2Video",
        class_name="AutoencoderKLLTX2Video",
        build=_VAE,
        latents=lambda vae: _ltx2(vae, "latent"),
        reference=_ltx2_reference,
        media="video",
        origin="end of pipeline",
        pipelines=("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
        parameters={"scaling": "none"},
        encode=_ENCODE,
        notes="The image that a video begins with is normalised without config.scaling_factor, unlike latents.",
    ),
    Case(
        name="AutoencoderKLLTX2Video: SANA-Video",
        class_name="AutoencoderKLLTX2Video",
        build=_UNSCALED_VAE,
        latents=lambda vae: random(2, 8, 2, 2, 3),
        reference=_sana,
        media="video",
        origin="end of pipeline",
        pipelines=("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        encode=Encode(pixels(1, 3, 32, 32), _sana_encoded, "argmax", "end of pipeline"),
        notes="Leaves config.scaling_factor out altogether, so that the case has 1.0.",
    ),
    Case(
        name="AutoencoderKLLTX2Video: SANA-WM",
        class_name="AutoencoderKLLTX2Video",
        build=_VAE,
        latents=lambda vae: random(1, 8, 2, 2, 3),
        reference=_sana_wm,
        media="video",
        origin="end of pipeline",
        pipelines=("SanaWMPipeline",),
        notes="It multiplies an encoded image by config.scaling_factor, which LTX-2's own pipelines do not.",
    ),
    Case(
        name="LTX2VideoDiffusionDecoderModel",
        class_name="LTX2VideoDiffusionDecoderModel",
        build=_DECODER,
        latents=lambda decoder: random(1, 8, 2, 3, 3),
        reference=lambda decoder, latents: _diffused(decoder, latents, True),
        media="video",
        origin="pipeline",
        pipelines=("LTX2VideoDiffusionDecodePipeline",),
        parameters={"seed": SEED},
    ),
    Case(
        name="LTX2VideoDiffusionDecoderModel: of LTX2Pipeline",
        class_name="LTX2VideoDiffusionDecoderModel",
        build=_DECODER,
        latents=lambda decoder: random(1, 8, 2, 3, 3),
        reference=lambda decoder, latents: _diffused(decoder, latents, False),
        media="video",
        origin="pipeline",
        pipelines=("LTX2VideoDiffusionDecodePipeline",),
        parameters={"seed": SEED, "scaling": "none"},
    ),
)
