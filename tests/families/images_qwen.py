"""AutoencoderKLQwenImage and its successor: video autoencoders by build, of one frame by use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    QwenImage21Pipeline,
    QwenImageEditPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
)
from diffusers.modular_pipelines.anima.decoders import AnimaProcessImagesOutputStep, AnimaVaeDecoderStep

from families.case import Case, Encode
from families.ends import bare, end
from families.images_made import SIZE, modular, of_transformer
from families.video_pipelines import SEED, Denoiser, generator, pixels, random, statistics, tiny

_MEAN, _STD = statistics(16)
_MEAN_64, _STD_64 = statistics(64)
_TINY: dict[str, Any] = {
    "base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
    "temperal_downsample": [False, True, True], "latents_mean": _MEAN, "latents_std": _STD,
}  # fmt: skip
_QWEN = tiny(AutoencoderKLQwenImage, loudness=1.5, **_TINY)
_RGBA = tiny(AutoencoderKLQwenImage, loudness=1.5, **_TINY, input_channels=4)
_QWEN_21 = tiny(
    AutoencoderKLQwenImage21, base_dim=4, decoder_base_dim=4, z_dim=64, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
    temperal_downsample=[False, True, True, True], latents_mean=_MEAN_64, latents_std=_STD_64,
)  # fmt: skip
_PROCESSOR = Denoiser()  # the constructor counts the tokens of a sentence
_PROCESSOR.apply_chat_template = lambda *args, **kwargs: [[0]]
_PROCESSOR.tokenizer = SimpleNamespace(encode=lambda text: [0])


def _packed(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    given = {"config": {"in_channels": 64, "guidance_embeds": False}, "guidance_scale": None}
    return of_transformer(QwenImagePipeline, vae, latents, output_type, **given)


def _layered(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Of one sample: from two on the pipeline deals the layers out wrongly, as if each sample had one more."""
    (layers,) = end(bare(QwenImageLayeredPipeline, vae=vae), latents=latents, layers=2, **SIZE)
    return layers


def _unpacked(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return modular((AnimaVaeDecoderStep, AnimaProcessImagesOutputStep), vae, latents=latents, output_type="pt")


def _of_21(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    size = {"height": 32, "width": 64}
    return end(
        bare(QwenImage21Pipeline, vae=vae, processor=_PROCESSOR), latents=latents, output_type=output_type, **size
    )


def _encoded(pipeline: Any, **parts: Any) -> Any:
    def encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return bare(pipeline, vae=vae, **parts)._encode_vae_image(image.unsqueeze(2), generator())

    return encoded


CASES = (
    Case(
        name="AutoencoderKLQwenImage: packed",
        class_name="AutoencoderKLQwenImage",
        build=_QWEN,
        latents=lambda vae: _packed(vae, random(2, 6, 64), "latent"),
        reference=_packed,
        media="image",
        origin="pipeline",
        pipelines=(
            "QwenImagePipeline",
            "QwenImageEditPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageControlNetPipeline",
            "Krea2Pipeline",
            "NucleusMoEImagePipeline",
        ),
        parameters=SIZE,
        encode=Encode(
            pixels(2, 3, 32, 48),
            _encoded(QwenImageImg2ImgPipeline),
            "sample",
            "end of pipeline",
            SEED,
        ),
        notes="Encoded latents are [B, 16, 1, h, w], before the pipeline packs them 2 by 2.",
    ),
    Case(
        name="AutoencoderKLQwenImage: Edit",
        class_name="AutoencoderKLQwenImage",
        build=_QWEN,
        latents=lambda vae: end(bare(QwenImageEditPipeline, vae=vae), latents=random(1, 6, 64), output_type="latent"),
        reference=lambda vae, latents: end(bare(QwenImageEditPipeline, vae=vae), latents=latents, **SIZE),
        media="image",
        origin="end of pipeline",
        pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        parameters=SIZE,
        encode=Encode(pixels(1, 3, 32, 48), _encoded(QwenImageEditPipeline), "argmax", "end of pipeline"),
        notes="Decodes as the other does, but encodes what it edits by the mode.",
    ),
    Case(
        name="AutoencoderKLQwenImage: Layered, packed",
        class_name="AutoencoderKLQwenImage",
        build=_RGBA,
        latents=lambda vae: random(1, 18, 64),
        reference=_layered,
        media="image",
        origin="end of pipeline",
        pipelines=("QwenImageLayeredPipeline",),
        parameters=SIZE | {"layers": 2},
        encode=Encode(pixels(1, 4, 32, 48), _encoded(QwenImageLayeredPipeline), "argmax", "end of pipeline"),
        notes="layers + 1 pictures lie one after the other; the first is dropped, the others come out as a batch in RGBA. "
        "The pipeline itself fails when it is asked for latents; they are what its callback is shown.",
    ),
    Case(
        name="AutoencoderKLQwenImage: Anima, not packed",
        class_name="AutoencoderKLQwenImage",
        build=_QWEN,
        latents=lambda vae: random(2, 16, 1, 4, 6),
        reference=_unpacked,
        media="image",
        origin="end of pipeline",
        pipelines=("AnimaModularPipeline",),
    ),
    Case(
        name="AutoencoderKLQwenImage21: packed",
        class_name="AutoencoderKLQwenImage21",
        build=_QWEN_21,
        latents=lambda vae: _of_21(vae, random(2, 8, 64), "latent"),
        reference=_of_21,
        media="image",
        origin="end of pipeline",
        pipelines=("QwenImage21Pipeline",),
        parameters={"height": 32, "width": 64},
        encode=Encode(
            pixels(2, 4, 32, 64), _encoded(QwenImage21Pipeline, processor=_PROCESSOR), "argmax", "end of pipeline"
        ),
        notes="A token is one pixel of the latents. RGBA in and out. Sizes are rounded down to multiples of 32.",
    ),
)
