"""Tiling of diffusers' autoencoders: how each kind turns it on. Always on a view of a module, never on one that others use.

Each takes the module, the edge of a tile in pixels (`size`) and the pixels along an edge for each latent (`ratio`)."""

from __future__ import annotations

from typing import Any

OVERLAP = 0.25
"""Of a tile's edge that its neighbour has too: with less, seams show (benchmarks/results/tiling.md)."""


def tile_squares(vae: Any, size: int, ratio: int) -> None:
    """Tiling by `tile_sample_min_size`, `tile_latent_min_size` and `tile_overlap_factor`, as AutoencoderKL has it."""
    vae.use_tiling = True
    vae.tile_sample_min_size, vae.tile_latent_min_size = size, size // ratio
    vae.tile_overlap_factor = OVERLAP


def tile_by_strides(vae: Any, size: int, ratio: int) -> None:
    """Tiling by `tile_sample_min_*` and `tile_sample_stride_*`, in pixels, as video autoencoders such as Wan's have it."""
    stride = int(size * (1 - OVERLAP))
    vae.enable_tiling(
        tile_sample_min_height=size,
        tile_sample_min_width=size,
        tile_sample_stride_height=stride,
        tile_sample_stride_width=stride,
    )


def tile_by_factors(vae: Any, size: int, ratio: int) -> None:
    """Tiling by `tile_sample_min_*` and `tile_overlap_factor_*`, as CogVideoX has it."""
    vae.enable_tiling(
        tile_sample_min_height=size,
        tile_sample_min_width=size,
        tile_overlap_factor_height=OVERLAP,
        tile_overlap_factor_width=OVERLAP,
    )


def tile_with_latents(vae: Any, size: int, ratio: int) -> None:
    """Tiling by `tile_sample_min_*`, `tile_latent_min_*` and one `tile_overlap_factor`, as HunyuanVideo 1.5 has it."""
    vae.enable_tiling(
        tile_sample_min_height=size,
        tile_sample_min_width=size,
        tile_latent_min_height=size // ratio,
        tile_latent_min_width=size // ratio,
        tile_overlap_factor=OVERLAP,
    )
