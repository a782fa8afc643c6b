"""The table: every image and video autoencoder of diffusers, a row for each convention. What is said of a row is what its own
pipelines do; tests/families holds each against them.

Sources: diffusers 0.42.1, the pipelines that tests/families names for each class, and the configurations on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from remote_vae_serve.conventions import IDENTITY, INVERTED, OF_PATCHES, OF_SIGMA, ROUNDED, SCALED_ONE_WAY, STATISTICS
from remote_vae_serve.decoders import (
    decode_at_a_time,
    decode_in_chunks,
    decode_in_tiles_always,
    decode_to_tensor,
    decode_with_noise,
    decode_without_quantising,
)
from remote_vae_serve.families import Family, LatentSpace
from remote_vae_serve.layouts import (
    CHANNELS_LAST,
    FOLDED,
    FRAMES_FIRST,
    IMAGE_CHANNELS_LAST,
    IMAGES,
    IMAGES_AS_FRAMES,
    ONE_FRAME,
    ONE_IMAGE,
    PATCHES,
    SHUFFLED,
    SQUARE_TOKENS,
    TARGET_TOKENS,
    VIDEO,
    packed,
    shuffle,
)
from remote_vae_serve.pixel_ranges import BYTES_BY_128, NORMED, UNIT

Config = Mapping[str, Any]


def _halvings(*names: str) -> Any:
    """2 for each level after the first, of whichever of these entries a config has."""

    def number(config: Config, model: Any) -> int:
        levels = next(config[name] for name in names if config.get(name))
        return int(2 ** (len(levels) - 1))

    return number


def _entry(name: str) -> Any:
    return lambda config, model: int(config[name])


def _said_by_model(name: str) -> Any:
    """Some configs have the number; every model has."""
    return lambda config, model: int(config[name] if model is None else getattr(model, name))


RATIO, FRAMES = _said_by_model("spatial_compression_ratio"), _said_by_model("temporal_compression_ratio")
Z_DIM, Z_CHANNELS = _entry("z_dim"), _entry("z_channels")


def _ratio_of_tiny(config: Config, model: Any) -> int:
    return int(config["upsampling_scaling_factor"] ** (len(config["decoder_block_out_channels"]) - 1))


def _ratio_if_known(config: Config, model: Any) -> int:
    if "block_out_channels" in config:
        return int(2 ** (len(config["block_out_channels"]) - 1))
    return int(getattr(model, "spatial_compression_ratio", 8))


def _ratio_of_rae(config: Config, model: Any) -> int:
    side = config["encoder_input_size"] // config["encoder_patch_size"]
    return int(config["image_size"] // side)


def _frames_of_wan(config: Config, model: Any) -> int:
    return int(config.get("scale_factor_temporal") or 4)


OVERLAP = 0.25
"""Of a tile's edge that its neighbour has too: with less, seams show (benchmarks/results/tiling.md)."""


def _tile_image(vae: Any, size: int, ratio: int) -> None:
    vae.use_tiling = True
    vae.tile_sample_min_size, vae.tile_latent_min_size = size, size // ratio
    vae.tile_overlap_factor = OVERLAP


def _tile_by_strides(vae: Any, size: int, ratio: int) -> None:
    stride = int(size * (1 - OVERLAP))
    vae.enable_tiling(
        tile_sample_min_height=size,
        tile_sample_min_width=size,
        tile_sample_stride_height=stride,
        tile_sample_stride_width=stride,
    )


def _buffers(model: Any, space: LatentSpace) -> tuple[torch.Tensor, torch.Tensor]:
    return model.latents_mean.float(), model.latents_std.float()


def _batch_norm(model: Any, space: LatentSpace) -> tuple[torch.Tensor, torch.Tensor]:
    """The deviation as the pipelines compute it of the variance."""
    return model.bn.running_mean, torch.sqrt(model.bn.running_var + space.option("batch_norm_eps"))


def _times(space: LatentSpace) -> tuple[str, ...]:
    return ("decode_timestep", "decode_noise_scale", "seed") if space.option("timestep_conditioning") else ()


_KL = _halvings("block_out_channels")
_IMAGE = (IMAGES, ONE_IMAGE, packed(), FOLDED, IMAGE_CHANNELS_LAST)
_WAN_IMAGE = (packed((1, 2), has_time=True), IMAGES_AS_FRAMES, TARGET_TOKENS)

FAMILIES: tuple[Family, ...] = (
    Family(
        "SD 1.x, SDXL, SD3, Flux.1, Z-Image and kin",
        ("AutoencoderKL",),
        _IMAGE,
        _KL,
        tile=_tile_image,
        hub=("stabilityai/sd-vae-ft-mse", "stabilityai/sdxl-vae", "black-forest-labs/FLUX.1-dev"),
    ),
    Family(
        "SD 1.5 inpainting, without the picture around",
        ("AsymmetricAutoencoderKL",),
        _IMAGE,
        _halvings("up_block_out_channels"),
        hub=("cross-attention/asymmetric-autoencoder-kl-x-1-5",),
    ),
    Family(
        "tiny decoders (TAESD and kin)",
        ("AutoencoderTiny",),
        _IMAGE,
        _ratio_of_tiny,
        tile=_tile_image,
        has_distribution=False,
        hub=("madebyollin/taesd", "madebyollin/taesdxl", "madebyollin/taef1"),
    ),
    # "VAE must stay in bfloat16 or float32", say the Sana docs.
    Family(
        "Sana, DC-AE",
        ("AutoencoderDC",),
        (IMAGES, ONE_IMAGE),
        RATIO,
        tile=_tile_by_strides,
        has_distribution=False,
        cast_first=True,
        half=torch.bfloat16,
        hub=("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",),
    ),
    Family(
        "DALL-E 3's decoder for SD 1.x",
        ("ConsistencyDecoderVAE",),
        (IMAGES, ONE_IMAGE),
        _halvings("encoder_block_out_channels"),
        decode=decode_with_noise,
        draws=True,
        takes=lambda space: ("seed",),
        hub=("openai/consistency-decoder",),
    ),
    Family(
        "Kandinsky 2 and 3, LDM",
        ("VQModel",),
        (IMAGES, ONE_IMAGE),
        _KL,
        convention=IDENTITY,
        decode=decode_without_quantising,
        takes=lambda space: ("force_not_quantize",),
        has_distribution=False,
        hub=("kandinsky-community/kandinsky-2-2-decoder", "kandinsky-community/kandinsky-3"),
    ),
    Family(
        "KVAE 2D",
        ("AutoencoderKLKVAE",),
        (IMAGES, ONE_IMAGE),
        _halvings("ch_mult"),
        Z_CHANNELS,
        convention=IDENTITY,
        hub=("kandinskylab/KVAE-2D-1.0",),
    ),
    # Its decoder undoes its statistics by itself.
    Family(
        "RAE",
        ("AutoencoderRAE",),
        (IMAGES, ONE_IMAGE, SQUARE_TOKENS),
        _ratio_of_rae,
        _entry("encoder_hidden_size"),
        convention=IDENTITY,
        range=UNIT,
        has_distribution=False,
        hub=("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",),
    ),
    Family(
        "Flux.2, ERNIE-Image, FIBO 2, Ideogram 4",
        ("AutoencoderKLFlux2",),
        (IMAGES, PATCHES, ONE_IMAGE, packed()),
        _KL,
        convention=OF_PATCHES,
        statistics=_batch_norm,
        tile=_tile_image,
        options=("batch_norm_eps",),
        hub=("black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-klein-4B"),
    ),
    Family(
        "Qwen-Image",
        ("AutoencoderKLQwenImage",),
        (ONE_FRAME, packed(has_time=True, layers=True), packed(has_time=True), IMAGES_AS_FRAMES, VIDEO),
        RATIO,
        Z_DIM,
        lambda config, model: 4,
        has_time=True,
        convention=STATISTICS,
        tile=_tile_by_strides,
        decodes_batches=False,
        cast_first=True,
        half=torch.bfloat16,
        hub=("Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit"),
    ),
    Family(
        "Qwen-Image 2.1",
        ("AutoencoderKLQwenImage21",),
        (ONE_FRAME, packed((1,), has_time=True, multiple=2), IMAGES_AS_FRAMES),
        RATIO,
        Z_DIM,
        _frames_of_wan,
        has_time=True,
        convention=STATISTICS,
        tile=_tile_by_strides,
        decodes_batches=False,
        cast_first=True,
        half=torch.bfloat16,
    ),
    Family(
        "HunyuanImage 2.1",
        ("AutoencoderKLHunyuanImage",),
        (IMAGES, ONE_IMAGE),
        RATIO,
        tile=_tile_image,
        cast_first=True,
        hub=("hunyuanvideo-community/HunyuanImage-2.1-Diffusers",),
    ),
    Family(
        "HunyuanImage 2.1's refiner",
        ("AutoencoderKLHunyuanImageRefiner",),
        (SHUFFLED,),
        RATIO,
        has_time=True,
        cast_first=True,
        half=torch.bfloat16,
        encoded=shuffle,
        hub=("hunyuanvideo-community/HunyuanImage-2.1-Refiner-Diffusers",),
    ),
    Family(
        "Wan 2.1 and 2.2, Cosmos 2, SkyReels, FIBO, JoyImage",
        ("AutoencoderKLWan",),
        (VIDEO, *_WAN_IMAGE),
        RATIO,
        Z_DIM,
        _frames_of_wan,
        convention=STATISTICS,
        takes=lambda space: ("drop_frames",),
        tile=_tile_by_strides,
        decodes_batches=False,
        fps=16,
        cast_first=True,
        half=torch.bfloat16,
        hub=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    ),
    Family(
        "LTX Video",
        ("AutoencoderKLLTXVideo",),
        (VIDEO, packed((1,), media="video", has_time=True)),
        RATIO,
        temporal_ratio=FRAMES,
        convention=SCALED_ONE_WAY,
        statistics=_buffers,
        decode=decode_at_a_time,
        draws=True,
        takes=_times,
        tile=_tile_by_strides,
        decodes_batches=False,
        fps=24,
        half=torch.bfloat16,
        options=("timestep_conditioning",),
        hub=("Lightricks/LTX-Video", "Lightricks/LTX-Video-0.9.7-dev"),
    ),
    Family(
        "LTX-2, Sana-Video",
        ("AutoencoderKLLTX2Video",),
        (VIDEO, packed((1,), media="video", has_time=True)),
        RATIO,
        temporal_ratio=FRAMES,
        convention=SCALED_ONE_WAY,
        statistics=_buffers,
        decode=decode_at_a_time,
        draws=True,
        takes=_times,
        tile=_tile_by_strides,
        decodes_batches=False,
        fps=24,
        half=torch.bfloat16,
        options=("timestep_conditioning",),
        hub=("Lightricks/LTX-2",),
    ),
    Family(
        "LTX-2's diffusion decoder",
        ("LTX2VideoDiffusionDecoderModel",),
        (VIDEO,),
        RATIO,
        temporal_ratio=FRAMES,
        convention=SCALED_ONE_WAY,
        statistics=_buffers,
        decode=decode_with_noise,
        draws=True,
        takes=lambda space: ("seed",),
        decodes_batches=False,
        fps=24,
        half=torch.bfloat16,
        hub=("Lightricks/LTX-2.5",),
    ),
    # 24 frames a second are what the model was trained on; its pipelines cast, then divide.
    Family(
        "HunyuanVideo, FramePack, Kandinsky 5 video",
        ("AutoencoderKLHunyuanVideo",),
        (VIDEO, CHANNELS_LAST),
        RATIO,
        temporal_ratio=FRAMES,
        takes=lambda space: ("drop_frames",),
        fps=24,
        cast_first=True,
        tile=_tile_by_strides,
        decodes_batches=False,
        hub=("hunyuanvideo-community/HunyuanVideo", "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"),
    ),
    Family(
        "HunyuanVideo 1.5",
        ("AutoencoderKLHunyuanVideo15",),
        (VIDEO,),
        RATIO,
        temporal_ratio=FRAMES,
        fps=24,
        cast_first=True,
        decodes_batches=False,
        hub=("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",),
    ),
    Family(
        "Kandinsky 6's super-resolution",
        ("Kandinsky6SRVAE",),
        (VIDEO,),
        RATIO,
        temporal_ratio=FRAMES,
        range=BYTES_BY_128,
        fps=24,
        cast_first=True,
        decodes_batches=False,
    ),
    Family(
        "CogVideoX, ConsisID",
        ("AutoencoderKLCogVideoX",),
        (FRAMES_FIRST, VIDEO),
        _KL,
        temporal_ratio=FRAMES,
        convention=INVERTED,
        options=("invert_scale_latents",),
        takes=lambda space: ("drop_frames",),
        decodes_batches=False,
        encoded=lambda latents: latents.transpose(1, 2),
        hub=("THUDM/CogVideoX-2b", "THUDM/CogVideoX-5b"),
    ),
    # Its own authors decode in float32.
    Family(
        "Mochi 1",
        ("AutoencoderKLMochi",),
        (VIDEO,),
        RATIO,
        temporal_ratio=FRAMES,
        tile=_tile_by_strides,
        decodes_batches=False,
        fps=30,
        half=torch.float32,
        hub=("genmo/mochi-1-preview",),
    ),
    # Cosmos 1's pipelines read sigma_data from their scheduler.
    Family(
        "Cosmos 1",
        ("AutoencoderKLCosmos",),
        (VIDEO,),
        RATIO,
        temporal_ratio=FRAMES,
        convention=OF_SIGMA,
        decodes_batches=False,
        fps=30,
        half=torch.bfloat16,
        hub=("nvidia/Cosmos-1.0-Diffusion-7B-Text2World",),
    ),
    # What an exception leaves in its convolutions is the beginning of the next video.
    Family(
        "EasyAnimate V5.1",
        ("AutoencoderKLMagvit",),
        (VIDEO,),
        RATIO,
        temporal_ratio=FRAMES,
        decodes_batches=False,
        half=torch.bfloat16,
        recover=lambda model: model._clear_conv_cache(),
        hub=("alibaba-pai/EasyAnimateV5.1-12b-zh",),
    ),
    Family(
        "Allegro",
        ("AutoencoderKLAllegro",),
        (VIDEO,),
        RATIO,
        temporal_ratio=FRAMES,
        any_frames=True,
        decode=decode_in_tiles_always,
        takes=lambda space: ("num_frames",),
        decodes_batches=False,
        fps=15,
        half=torch.float32,
        hub=("rhymes-ai/Allegro",),
    ),
    # Its image encoder's latents are not scaled (StableVideoDiffusionPipeline._encode_vae_image): ask for no scaling there.
    Family(
        "Stable Video Diffusion, Latte",
        ("AutoencoderKLTemporalDecoder",),
        (FRAMES_FIRST, VIDEO),
        _KL,
        temporal_ratio=lambda config, model: 1,
        has_time=False,
        decode=decode_in_chunks,
        takes=lambda space: ("decode_chunk_size",),
        decodes_batches=False,
        fps=7,
        hub=("stabilityai/stable-video-diffusion-img2vid-xt",),
    ),
    Family(
        "MiniMax-H3",
        ("AutoencoderKLMiniMaxH3",),
        (VIDEO,),
        RATIO,
        temporal_ratio=FRAMES,
        convention=ROUNDED,
        range=NORMED,
        any_frames=True,
        decodes_batches=False,
        fps=24,
        half=torch.bfloat16,
        hub=("MiniMaxAI/MiniMax-H3",),
    ),
    Family(
        "KVAE 3D",
        ("AutoencoderKLKVAEVideo",),
        (VIDEO,),
        _halvings("ch_mult"),
        Z_CHANNELS,
        _entry("temporal_compress_times"),
        convention=IDENTITY,
        decodes_batches=False,
        hub=("kandinskylab/KVAE-3D-1.0",),
    ),
    Family(
        "VidTok",
        ("AutoencoderVidTok",),
        (VIDEO,),
        _halvings("ch_mult"),
        Z_CHANNELS,
        FRAMES,
        convention=IDENTITY,
        any_frames=True,
        decode=decode_to_tensor,
        decodes_batches=False,
        options=("is_causal",),
        hub=("microsoft/VidTok",),
    ),
)
GENERIC = Family("a class without a row: treated as an image VAE", (), _IMAGE, _ratio_if_known)


def latent_space_of(class_name: str, config: Config, model: Any = None) -> LatentSpace:
    """From a diffusers class name and its config; a class without a row gets the generic one.

    Args:
        model: of the class, with or without weights; some rows read their numbers from it.
    """
    family = next((row for row in FAMILIES if class_name in row.classes), GENERIC)
    return family.space(class_name, config, model)
