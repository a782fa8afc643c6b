"""AutoencoderKLLTXVideo: statistics in buffers, latents packed or not, and decoders that take a time and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXConditionPipeline, LTXImageToVideoPipeline, LTXPipeline

from families.case import Case, Encode
from families.ends import bare, end
from families.video_pipelines import (
    SEED,
    Denoiser,
    buffers,
    called,
    ending,
    generator,
    pixels,
    random,
    statistics,
    tiny,
    words,
)

_MEAN, _STD = statistics(8)
_COMMON: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 8, "patch_size": 1, "patch_size_t": 1,
    "encoder_causal": True, "decoder_causal": False, "block_out_channels": (8, 8, 8, 8), "scaling_factor": 0.7,
}  # fmt: skip
_FIRST: dict[str, Any] = {
    "decoder_block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1), "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False), "decoder_inject_noise": (False,) * 5,
    "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4, "timestep_conditioning": False,
}  # fmt: skip
_TIMED: dict[str, Any] = {
    "decoder_block_out_channels": (16, 32, 64), "layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1), "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True), "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2), "timestep_conditioning": True,
}  # fmt: skip


def _module(**config: Any) -> Callable[[], Any]:
    built = tiny(AutoencoderKLLTXVideo, **_COMMON, **config)
    return buffers(built, {"latents_mean": _MEAN, "latents_std": _STD})


_NOISE = {"decode_timestep": 0.05, "decode_noise_scale": 0.3, "seed": SEED}


def _whole(pipeline: Any, vae: Any, denoised: torch.Tensor, output_type: str = "pt", **said: Any) -> torch.Tensor:
    """The generator's first draw is the decoder's noise: the latents that the pipeline starts from are given to it."""
    transformer = Denoiser(in_channels=8, patch_size=1, patch_size_t=1)
    pipe = bare(pipeline, vae=vae, scheduler=ending(denoised), transformer=transformer)
    batch = len(denoised)
    embedded = {"prompt_embeds": words(batch), "prompt_attention_mask": torch.ones(batch, 1), "guidance_scale": 1.0}
    seed = said.pop("seed", SEED)
    # AutoencoderKLLTXVideo with decoder_inject_noise draws from torch's global generator, whatever the pipeline is given.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return called(pipe, output_type, latents=denoised, generator=generator(seed), **embedded, **said)


def _packed(vae: Any, latents: torch.Tensor, output_type: str = "pt", **said: Any) -> torch.Tensor:
    return _whole(LTXPipeline, vae, latents, output_type, **said)


def _condition(vae: Any, latents: torch.Tensor, **said: Any) -> torch.Tensor:
    """The pipeline's `latents` argument is mixed with noise there, so that its end is run instead of the whole."""
    seed = said.pop("seed", SEED)
    names = {"generator": generator(seed), "device": latents.device, "batch_size": len(latents)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return end(bare(LTXConditionPipeline, vae=vae), latents=latents, prompt_embeds=latents, **names, **said)


def _encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """The first frame of the prepared latents, from tokens back to `[B, C, 1, h, w]`: the others are noise."""
    batch, _, height, width = images.shape
    pipe = bare(LTXImageToVideoPipeline, vae=vae, transformer=Denoiser(patch_size=1, patch_size_t=1))
    size = {"height": height, "width": width, "num_frames": 1}
    tokens, _ = pipe.prepare_latents(images, batch, 8, dtype=torch.float32, generator=generator(), **size)
    ratio = vae.spatial_compression_ratio
    return pipe._unpack_latents(tokens, 1, height // ratio, width // ratio)


_FIRST_VAE = _module(**_FIRST)
_NOISY_VAE = _module(**_TIMED, decoder_inject_noise=(True, True, True, False))
_NOISELESS_VAE = _module(**_TIMED, decoder_inject_noise=(False,) * 4)


def _case(name: str, build: Callable[[], Any], batch: int, size: Mapping[str, int], tokens: int, **said: Any) -> Case:
    parameters = {**size, **said}
    return Case(
        name=f"AutoencoderKLLTXVideo: {name}",
        class_name="AutoencoderKLLTXVideo",
        build=build,
        latents=lambda vae: _packed(vae, random(batch, tokens, 8), "latent", **parameters),
        reference=lambda vae, latents: _packed(vae, latents, **parameters),
        media="video",
        origin="pipeline",
        pipelines=("LTXPipeline", "LTXImageToVideoPipeline"),
        parameters=parameters,
        encode=Encode(pixels(1, 3, 32, 32), _encoded, "sample", "end of pipeline", SEED),
    )


def _unpacked(name: str, build: Callable[[], Any], batch: int, **said: Any) -> Case:
    return Case(
        name=f"AutoencoderKLLTXVideo: {name}",
        class_name="AutoencoderKLLTXVideo",
        build=build,
        latents=lambda vae: random(batch, 8, 2, 2, 3),
        reference=lambda vae, latents: _condition(vae, latents, **said),
        media="video",
        origin="end of pipeline",
        pipelines=("LTXConditionPipeline", "LTXLatentUpsamplePipeline"),
        parameters=said,
    )


CASES = (
    _case("0.9.0", _FIRST_VAE, 2, {"height": 32, "width": 64, "num_frames": 5}, 2 * 8 * 16),
    _unpacked("0.9.0, unpacked", _FIRST_VAE, 2),
    _case("0.9.1", _NOISY_VAE, 1, {"height": 32, "width": 64, "num_frames": 9}, 2 * 4 * 8, **_NOISE),
    _case("0.9.5", _NOISELESS_VAE, 1, {"height": 32, "width": 64, "num_frames": 9}, 2 * 4 * 8, **_NOISE),
    _unpacked("0.9.5, unpacked", _NOISELESS_VAE, 1, **_NOISE),
    _unpacked("0.9.5, noise scale as timestep", _NOISELESS_VAE, 1, decode_timestep=0.3, seed=SEED),
)
