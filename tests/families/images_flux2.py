"""AutoencoderKLFlux2: statistics in a batch norm over 2 by 2 patches, and five ways to hand the latents out."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    BriaFibo2Pipeline,
    ErnieImagePipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Ideogram4Pipeline,
)

from families.case import Case, Encode
from families.ends import bare, end
from families.images_made import SIZE, of_transformer
from families.video_pipelines import generator, pixels, random, statistics, tiny

_MEAN, _STD = statistics(128)
_FLUX2 = tiny(
    AutoencoderKLFlux2, sample_size=64, down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=32,
    norm_num_groups=2,
)  # fmt: skip


@cache
def _build() -> Any:
    """The variances are so small that `batch_norm_eps` counts."""
    vae = _FLUX2()
    vae.bn.running_mean.copy_(torch.tensor(_MEAN))
    vae.bn.running_var.copy_((torch.tensor(_STD) / 20) ** 2)
    return vae


def _dev(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    return of_transformer(Flux2Pipeline, vae, latents, output_type, {"in_channels": 128})


def _klein_latents(vae: Any) -> torch.Tensor:
    return of_transformer(Flux2KleinPipeline, vae, random(2, 6, 128), "latent", {"in_channels": 128})


def _klein(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return end(bare(Flux2KleinPipeline, vae=vae), latents=latents)


def _ernie(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    config = {"in_channels": 128, "text_in_dim": 8}
    with warnings.catch_warnings():
        # The pipeline hands the scheduler a tensor where it takes an array.
        warnings.simplefilter("ignore", DeprecationWarning)
        return of_transformer(ErnieImagePipeline, vae, latents, output_type, config)


def _fibo(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    return end(bare(BriaFibo2Pipeline, vae=vae), latents=latents, output_type=output_type)


def _ideogram(vae: Any, latents: torch.Tensor, output_type: str = "pt") -> torch.Tensor:
    names = {"batch_size": len(latents), "num_images_per_prompt": 1, "grid_h": 2, "grid_w": 3}
    return end(bare(Ideogram4Pipeline, vae=vae), latents=latents, output_type=output_type, **names)


def _encoded(pipeline: Any) -> Encode:
    def encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return bare(pipeline, vae=vae)._encode_vae_image(image, generator())

    return Encode(pixels(2, 3, 32, 48), encoded, "argmax", "end of pipeline")


def _fibo_encoded(vae: Any, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return bare(BriaFibo2Pipeline, vae=vae).prepare_image_latents([image], 1, "cpu", torch.float32)[0]


CASES = (
    Case(
        name="AutoencoderKLFlux2: Flux.2 dev, packed",
        class_name="AutoencoderKLFlux2",
        build=_build,
        latents=lambda vae: _dev(vae, random(2, 6, 128), "latent"),
        reference=_dev,
        media="image",
        origin="pipeline",
        pipelines=("Flux2Pipeline",),
        parameters=SIZE,
        encode=_encoded(Flux2Pipeline),
        notes="Encoded latents are patches, [B, 128, h / 2, w / 2], before the pipeline packs them.",
    ),
    Case(
        name="AutoencoderKLFlux2: Flux.2 Klein, denormalized",
        class_name="AutoencoderKLFlux2",
        build=_build,
        latents=_klein_latents,
        reference=_klein,
        media="image",
        origin="end of pipeline",
        pipelines=("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
        parameters={"scaling": "none"},
        encode=_encoded(Flux2KleinPipeline),
        notes="[B, 32, h, w] and ready to be decoded; FIBO 2 has the same shape and is not.",
    ),
    Case(
        name="AutoencoderKLFlux2: ERNIE-Image, patches",
        class_name="AutoencoderKLFlux2",
        build=_build,
        latents=lambda vae: _ernie(vae, random(2, 128, 2, 3), "latent"),
        reference=_ernie,
        media="image",
        origin="pipeline",
        pipelines=("ErnieImagePipeline",),
        parameters={"batch_norm_eps": 1e-5},
        notes="The pipeline has its own 1e-5 for the config's batch_norm_eps.",
    ),
    Case(
        name="AutoencoderKLFlux2: Bria FIBO 2",
        class_name="AutoencoderKLFlux2",
        build=_build,
        latents=lambda vae: _fibo(vae, random(2, 32, 4, 6), "latent"),
        reference=_fibo,
        media="image",
        origin="end of pipeline",
        pipelines=("BriaFibo2Pipeline",),
        encode=Encode(pixels(1, 3, 32, 48), _fibo_encoded, "argmax", "end of pipeline"),
        notes="Not packed and still normalised, encoded latents too.",
    ),
    Case(
        name="AutoencoderKLFlux2: Ideogram 4, packed",
        class_name="AutoencoderKLFlux2",
        build=_build,
        latents=lambda vae: _ideogram(vae, random(2, 6, 128), "latent"),
        reference=_ideogram,
        media="image",
        origin="end of pipeline",
        pipelines=("Ideogram4Pipeline",),
        parameters=SIZE | {"channel_order": "ph pw c"},
        notes="The 128 numbers of a token are the patch's rows, columns, then channels; everyone else has channels first.",
    ),
)
