"""Families of image autoencoders, a row each. Each says what its own pipelines do; tests/families holds it against them."""

from __future__ import annotations

import torch

from remote_vae_serve.families.checks import check_square
from remote_vae_serve.families.config_readers import (
    OF_BLOCKS,
    RATIO,
    Z_CHANNELS,
    Z_DIM,
    batch_norm,
    entry,
    frames_of_wan,
    halvings,
    ratio_of_rae,
    ratio_of_tiny,
)
from remote_vae_serve.families.decoders import decode_with_noise, decode_without_quantising, schedule_on_host
from remote_vae_serve.families.family import Family
from remote_vae_serve.families.latent_scaling import IDENTITY, OF_PATCHES, STATISTICS
from remote_vae_serve.families.layouts import (
    FOLDED,
    IMAGE_CHANNELS_LAST,
    IMAGES,
    IMAGES_AS_FRAMES,
    ONE_FRAME,
    ONE_IMAGE,
    PATCHES,
    SHUFFLED,
    SQUARE_TOKENS,
    VIDEO,
    shuffle,
)
from remote_vae_serve.families.packed_layouts import packed
from remote_vae_serve.families.pixel_ranges import UNIT
from remote_vae_serve.families.tile_rules import tile_by_strides, tile_squares

IMAGE_LAYOUTS = (IMAGES, ONE_IMAGE, packed(), FOLDED, IMAGE_CHANNELS_LAST)
ROWS: tuple[Family, ...] = (
    Family(
        "SD 1.x, SDXL, SD3, Flux.1, Z-Image and kin",
        ("AutoencoderKL",),
        IMAGE_LAYOUTS,
        OF_BLOCKS,
        tile=tile_squares,
        hub=("stabilityai/sd-vae-ft-mse", "stabilityai/sdxl-vae", "black-forest-labs/FLUX.1-dev"),
    ),
    Family(
        "SD 1.5 inpainting, without the picture around",
        ("AsymmetricAutoencoderKL",),
        IMAGE_LAYOUTS,
        halvings("up_block_out_channels"),
        hub=("cross-attention/asymmetric-autoencoder-kl-x-1-5",),
    ),
    Family(
        "tiny decoders (TAESD and kin)",
        ("AutoencoderTiny",),
        IMAGE_LAYOUTS,
        ratio_of_tiny,
        tile=tile_squares,
        has_distribution=False,
        hub=("madebyollin/taesd", "madebyollin/taesdxl", "madebyollin/taef1"),
    ),
    # "VAE must stay in bfloat16 or float32", say the Sana docs.
    Family(
        "Sana, DC-AE",
        ("AutoencoderDC",),
        (IMAGES, ONE_IMAGE),
        RATIO,
        tile=tile_by_strides,
        has_distribution=False,
        cast_first=True,
        half=torch.bfloat16,
        hub=("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",),
    ),
    Family(
        "DALL-E 3's decoder for SD 1.x",
        ("ConsistencyDecoderVAE",),
        (IMAGES, ONE_IMAGE),
        halvings("encoder_block_out_channels"),
        decode=decode_with_noise,
        draws=True,
        without_values=schedule_on_host,
        takes=lambda space: ("seed",),
        hub=("openai/consistency-decoder",),
    ),
    Family(
        "Kandinsky 2 and 3, LDM",
        ("VQModel",),
        (IMAGES, ONE_IMAGE),
        OF_BLOCKS,
        scaling=IDENTITY,
        decode=decode_without_quantising,
        takes=lambda space: ("force_not_quantize",),
        has_distribution=False,
        hub=("kandinsky-community/kandinsky-2-2-decoder", "kandinsky-community/kandinsky-3"),
    ),
    Family(
        "KVAE 2D",
        ("AutoencoderKLKVAE",),
        (IMAGES, ONE_IMAGE),
        halvings("ch_mult"),
        Z_CHANNELS,
        scaling=IDENTITY,
        tile=tile_squares,
        hub=("kandinskylab/KVAE-2D-1.0",),
    ),
    # Its decoder undoes its statistics by itself.
    Family(
        "RAE",
        ("AutoencoderRAE",),
        (IMAGES, ONE_IMAGE, SQUARE_TOKENS),
        ratio_of_rae,
        entry("encoder_hidden_size"),
        scaling=IDENTITY,
        range=UNIT,
        check=check_square,
        options=("reshape_to_2d",),
        has_distribution=False,
        hub=("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",),
    ),
    Family(
        "Flux.2, ERNIE-Image, FIBO 2, Ideogram 4",
        ("AutoencoderKLFlux2",),
        (IMAGES, PATCHES, ONE_IMAGE, packed()),
        OF_BLOCKS,
        scaling=OF_PATCHES,
        statistics=batch_norm,
        tile=tile_squares,
        options=("batch_norm_eps",),
        hub=("black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-klein-4B"),
    ),
    Family(
        "Qwen-Image",
        ("AutoencoderKLQwenImage",),
        (ONE_FRAME, packed(has_time=True, layers=True), packed(has_time=True, or_layers=True), IMAGES_AS_FRAMES, VIDEO),
        RATIO,
        Z_DIM,
        lambda config, model: 4,
        has_time=True,
        scaling=STATISTICS,
        tile=tile_by_strides,
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
        frames_of_wan,
        has_time=True,
        scaling=STATISTICS,
        tile=tile_by_strides,
        decodes_batches=False,
        cast_first=True,
        half=torch.bfloat16,
    ),
    Family(
        "HunyuanImage 2.1",
        ("AutoencoderKLHunyuanImage",),
        (IMAGES, ONE_IMAGE),
        RATIO,
        tile=tile_squares,
        cast_first=True,
        hub=("hunyuanvideo-community/HunyuanImage-2.1-Diffusers",),
    ),
    Family(
        "HunyuanImage 2.1's refiner",
        ("AutoencoderKLHunyuanImageRefiner",),
        (SHUFFLED, ONE_FRAME),
        RATIO,
        has_time=True,
        cast_first=True,
        half=torch.bfloat16,
        encoded=shuffle,
        hub=("hunyuanvideo-community/HunyuanImage-2.1-Refiner-Diffusers",),
    ),
)
