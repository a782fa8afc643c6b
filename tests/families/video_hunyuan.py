"""The autoencoders of HunyuanVideo and of Kandinsky's videos: one scaling factor, channels first or last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky6SRPipeline,
    Kandinsky6SRVAE,
    Kandinsky6TI2VAPipeline,
)

from families.case import Case, Encode
from families.ends import bare, end, run
from families.video_pipelines import SEED, Denoiser, called, ending, generator, pixels, random, tiny, words

_HUNYUAN = tiny(
    AutoencoderKLHunyuanVideo, in_channels=3, out_channels=3, latent_channels=4,
    down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.476986,
    spatial_compression_ratio=8, temporal_compression_ratio=4,
)  # fmt: skip
_HUNYUAN_15 = tiny(
    AutoencoderKLHunyuanVideo15, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 16),
    layers_per_block=1, spatial_compression_ratio=4, temporal_compression_ratio=2, downsample_match_channel=False,
    upsample_match_channel=False, scaling_factor=0.6,
)  # fmt: skip
_KANDINSKY_SR = tiny(
    Kandinsky6SRVAE, in_channels=3, out_channels=3, latent_channels=4, encoder_block_out_channels=(16, 32, 32),
    decoder_block_out_channels=(16, 32, 32), layers_per_block=1, temporal_compression_ratio=4,
    temporal_compression_start_level=0, scaling_factor=0.6,
)  # fmt: skip


def _hunyuan(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    batch, channels, frames, height, width = latents.shape
    transformer = Denoiser(in_channels=channels, guidance_embeds=True)
    pipe = bare(HunyuanVideoPipeline, vae=vae, scheduler=ending(latents), transformer=transformer)
    embedded = {
        "prompt_embeds": words(batch),
        "pooled_prompt_embeds": words(batch)[:, 0],
        "prompt_attention_mask": torch.ones(batch, 1),
    }
    size = {"height": height * 8, "width": width * 8, "num_frames": (frames - 1) * 4 + 1}
    return called(pipe, output_type, **embedded, **size)


def _hunyuan_encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """One latent frame; the second thing that the pipeline prepares is the image before its noise."""
    batch, _, height, width = images.shape
    pipe = bare(HunyuanVideoImageToVideoPipeline, vae=vae)
    size = {"height": height, "width": width, "num_frames": 1}
    return pipe.prepare_latents(images, batch, 4, dtype=torch.float32, generator=generator(), **size)[1]


def _kandinsky5(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    batch, frames, height, width, channels = latents.shape
    size = {"height": height * 8, "width": width * 8, "num_frames": (frames - 1) * 4 + 1}
    names = {"batch_size": batch, "num_videos_per_prompt": 1, "num_channels_latents": channels}
    return end(bare(Kandinsky5T2VPipeline, vae=vae), latents=latents, **size, **names)


def _kandinsky5_encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Of the statements that encode the image alone: those before them draw the other frames from the same generator."""
    batch, _, height, width = images.shape
    names = {"height": height, "width": width, "device": images.device, "dtype": images.dtype, "generator": generator()}
    before = torch.zeros(batch, 1, height // 8, width // 8, 4)
    pipe = bare(Kandinsky5I2VPipeline, vae=vae)
    # The processor takes pixels in [0, 1].
    ran = run(
        Kandinsky5I2VPipeline.prepare_latents, "image_tensor =", "if self.transformer.visual_cond",
        self=pipe, image=images / 2 + 0.5, latents=before, **names,
    )  # fmt: skip
    return ran["latents"]


def _kandinsky6(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(bare(Kandinsky6TI2VAPipeline, vae=vae), latents=latents, sample_audio=False, audio_latents=None)


def _hunyuan_15(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(bare(HunyuanVideo15Pipeline, vae=vae), latents=latents)


def _hunyuan_15_encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    pipe = bare(HunyuanVideo15ImageToVideoPipeline, vae=vae)
    height, width = images.shape[-2:]
    # The processor takes pixels in [0, 1].
    with torch.no_grad():
        return pipe._get_image_latents(vae, pipe.video_processor, images / 2 + 0.5, height, width, images.device)


def _kandinsky_sr(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pipe = bare(Kandinsky6SRPipeline, vae=vae)
    with torch.no_grad():
        return pipe.video_processor.postprocess_video(pipe.decode_latents(latents), "pt")


def _kandinsky_sr_encoded(vae: Any, video: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return bare(Kandinsky6SRPipeline, vae=vae).encode_video(video)


_HUNYUAN_ENCODE = Encode(pixels(2, 3, 32, 32), _hunyuan_encoded, "argmax", "end of pipeline")

CASES = (
    Case(
        name="AutoencoderKLHunyuanVideo",
        class_name="AutoencoderKLHunyuanVideo",
        build=_HUNYUAN,
        latents=lambda vae: _hunyuan(vae, random(2, 4, 2, 4, 4), "latent"),
        reference=_hunyuan,
        media="video",
        origin="pipeline",
        pipelines=("HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
        encode=_HUNYUAN_ENCODE,
        notes="Of an image to video only with image_condition_type token_replace: latent_concat hands out latents without"
        " their first frame, on which the pixels of its own video depend.",
    ),
    Case(
        name="AutoencoderKLHunyuanVideo: frames in tiles",
        class_name="AutoencoderKLHunyuanVideo",
        build=_HUNYUAN,
        latents=lambda vae: random(1, 4, 6, 2, 2),
        reference=_hunyuan,
        media="video",
        origin="pipeline",
        pipelines=("HunyuanVideoPipeline",),
        notes="More than 16 frames: the module decodes them in overlapping tiles unless told otherwise.",
    ),
    Case(
        name="AutoencoderKLHunyuanVideo: Kandinsky 5",
        class_name="AutoencoderKLHunyuanVideo",
        build=_HUNYUAN,
        latents=lambda vae: random(2, 2, 4, 6, 4),
        reference=_kandinsky5,
        media="video",
        origin="end of pipeline",
        pipelines=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
        encode=Encode(pixels(1, 3, 32, 32), _kandinsky5_encoded, "sample", "end of pipeline", SEED),
        notes="Channels last, also of an encoded image.",
    ),
    Case(
        name="AutoencoderKLHunyuanVideo: Kandinsky 6",
        class_name="AutoencoderKLHunyuanVideo",
        build=_HUNYUAN,
        latents=lambda vae: random(2, 4, 2, 4, 4),
        reference=_kandinsky6,
        media="video",
        origin="end of pipeline",
        pipelines=("Kandinsky6TI2VAPipeline",),
        notes="Channels last inside the pipeline, first in what it hands out.",
    ),
    Case(
        name="AutoencoderKLHunyuanVideo15",
        class_name="AutoencoderKLHunyuanVideo15",
        build=_HUNYUAN_15,
        latents=lambda vae: random(1, 4, 2, 4, 4),
        reference=_hunyuan_15,
        media="video",
        origin="end of pipeline",
        pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
        encode=Encode(pixels(1, 3, 16, 16), _hunyuan_15_encoded, "argmax", "end of pipeline"),
        notes="The decoder and the encoder take one sample at a time.",
    ),
    Case(
        name="Kandinsky6SRVAE",
        class_name="Kandinsky6SRVAE",
        build=_KANDINSKY_SR,
        latents=lambda vae: random(2, 4, 2, 3, 3),
        reference=_kandinsky_sr,
        media="video",
        origin="end of pipeline",
        pipelines=("Kandinsky6SRPipeline",),
        encode=Encode(pixels(2, 3, 5, 16, 16), _kandinsky_sr_encoded, "argmax", "end of pipeline"),
        notes="The pixels are those of x / 128 - 1 on both ways; the pipeline hands out no latents.",
    ),
)
