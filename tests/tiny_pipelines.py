"""Whole pipelines of diffusers around a VAE, tiny and random, without downloads: what a user would call `pipe`.

The same seed makes the same weights, so that two pipelines of a kind differ in their VAE alone. Only SD has a text encoder
and a tokenizer; the others are given embeddings, which all of them take in place of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_TO_IMAGE: dict[str, Any] = {
    "sd": StableDiffusionPipeline,
    "tiny": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
    "hunyuan": HunyuanVideoPipeline,
}
IMAGE_TO_IMAGE: dict[str, Any] = {
    "sd": StableDiffusionImg2ImgPipeline,
    "tiny": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "flux": FluxImg2ImgPipeline,
}
WIDTH = 32
"""Of every embedding."""


def pipeline(kind: str, vae: Any, folder: Path, image_to_image: bool = False) -> Any:
    """A pipeline of that kind with that VAE, on the CPU in float32; `folder` takes the tokenizer's files."""
    built = (IMAGE_TO_IMAGE if image_to_image else TEXT_TO_IMAGE)[kind](vae=vae, **components(kind, folder))
    built.set_progress_bar_config(disable=True)
    return built


def components(kind: str, folder: Path) -> dict[str, Any]:
    """All that a pipeline of that kind has besides its VAE."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _COMPONENTS[kind](folder)


def arguments(kind: str, image_to_image: bool = False, batch: int = 1) -> dict[str, Any]:
    """What to call a pipeline of that kind with: small, seeded, two steps, tensors out."""
    common: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(2),
    }
    embeddings = _embedded(batch, 7, WIDTH)
    if kind in ("sd", "tiny"):
        words: dict[str, Any] = {"prompt": ["a cat"] * batch}
    elif kind == "hunyuan":
        words = {"prompt_embeds": embeddings, "prompt_attention_mask": torch.ones(batch, 7)}
        common |= {"num_frames": 9, "pooled_prompt_embeds": _embedded(batch, WIDTH)}
    else:
        words = {"prompt_embeds": embeddings, "pooled_prompt_embeds": _embedded(batch, WIDTH)}
    if kind in ("sdxl", "sd3"):
        words |= {"negative_" + name: -value for name, value in words.items()}
    if not image_to_image:
        return common | words | {"height": 32, "width": 48}
    picture = torch.rand(batch, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    size = {} if kind in ("sd", "tiny", "sdxl") else {"height": 32, "width": 48}
    return (
        common
        | words
        | size
        | {"image": picture, "strength": 1.0 if kind == "hunyuan" else 0.6, "num_inference_steps": 4}
    )


def output(result: Any) -> torch.Tensor:
    """The pictures or the video of a result."""
    pixels = result.frames if hasattr(result, "frames") else result.images
    assert isinstance(pixels, torch.Tensor)
    return pixels


def _embedded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Of single letters."""
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=7)


def _unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, **changes,
    ).eval()  # fmt: skip


def _sd(folder: Path) -> dict[str, Any]:
    text = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1, vocab_size=54,
        max_position_embeddings=7, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return {
        "unet": _unet(), "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "text_encoder": CLIPTextModel(text).eval(), "tokenizer": _tokenizer(folder),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


def _sdxl(folder: Path) -> dict[str, Any]:
    unet = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {"unet": unet, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False), **dict.fromkeys(texts)}


def _sd3(folder: Path) -> dict[str, Any]:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, out_channels=16,
    )  # fmt: skip
    texts = [name + end for end in ("", "_2", "_3") for name in ("text_encoder", "tokenizer")]
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(texts),
    }


def _flux(folder: Path) -> dict[str, Any]:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(texts),
    }


def _hunyuan(folder: Path) -> dict[str, Any]:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(texts),
    }


_COMPONENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sd": _sd,
    "tiny": _sd,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "hunyuan": _hunyuan,
}
