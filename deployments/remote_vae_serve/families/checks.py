"""Checks of latents against a family's decoder: what it cannot take, or would spoil without a word, is refused before it runs.

Each takes latents `[B, C, (T,) h, w]` (or tokens `[B, N, C]`), the latent space and the request's hints; each raises
BadRequest."""

from __future__ import annotations

from collections.abc import Callable

import torch

from remote_vae.errors import BadRequest
from remote_vae_serve.families.latent_numbers import LatentNumbers
from remote_vae_serve.families.layouts import RequestHints

Check = Callable[[torch.Tensor, LatentNumbers, RequestHints], None]


def check_nothing(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> None:
    """The check of decoders that take whatever the layout lets through."""


def check_fours(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> None:
    """Latent frames in multiples of 4: VidTok's decoders that are not causal drop the rest, silently."""
    if not space.option("is_causal") and latents.shape[2] % 4:
        raise BadRequest(
            f"The latents have {latents.shape[2]} frames; this {space.class_name}, which is not causal, takes multiples of 4",
            parameter="shape",
        )


def check_timestep(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> None:
    """The hint `decode_timestep`, where the decoder has timestep conditioning."""
    if space.option("timestep_conditioning"):
        timestep_of(space, hints)


def timestep_of(space: LatentNumbers, hints: RequestHints) -> float:
    """The hint `decode_timestep`, 0 to 1. Raises BadRequest where there is none."""
    if hints.decode_timestep is None:
        raise BadRequest(
            f"This {space.class_name} is told how noisy its latents are: send decode_timestep (LTXPipeline's default is 0.0; the "
            "model cards have 0.05), and decode_noise_scale where it is another",
            parameter="decode_timestep",
        )
    return hints.decode_timestep


def check_square(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> None:
    """Tokens or a square grid, whichever RAE's config says (`reshape_to_2d`)."""
    as_tokens = space.option("reshape_to_2d") is False
    if as_tokens != (latents.ndim == 3):
        expected = f"[B, N, {space.channels}]" if as_tokens else f"[B, {space.channels}, h, w]"
        raise BadRequest(
            f"Latents of shape {list(latents.shape)} are not what this {space.class_name} takes; its config says {expected}",
            parameter="shape",
        )
    if latents.ndim == 4 and latents.shape[2] != latents.shape[3]:
        raise BadRequest(
            f"The latents are {latents.shape[2]} x {latents.shape[3]}; {space.class_name} takes squares",
            parameter="shape",
        )


def check_clip(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> None:
    """Latent frames of one clip at least: of a shorter video MiniMax-H3 makes nothing."""
    clip, dropped = space.option("clip_length"), space.option("token_drop")
    least = -(-clip // (space.temporal_ratio or 1)) - dropped + 1 if dropped else 1
    if latents.shape[2] < least:
        raise BadRequest(
            f"The latents have {latents.shape[2]} frames; this {space.class_name} takes {least} at least",
            parameter="shape",
        )


def check_neighbours(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> None:
    """Frames, rows and columns for neighbourhood attention: it takes no grid smaller than its kernel, at the first stage nor
    at the last."""
    (first, *_), last = space.option("decoder_stage_kernels"), space.option("decoder_stage5_kernel")
    growth = space.ratio // space.option("patch_size")
    frames = 1 + -(-(last[0] - 1) // (space.temporal_ratio or 1))
    least = frames, *(max(here, -(-there // growth)) for here, there in zip(first[1:], last[1:], strict=True))
    if any(edge < most for edge, most in zip(latents.shape[2:], least, strict=True)):
        raise BadRequest(
            f"The latents have {' x '.join(map(str, latents.shape[2:]))} frames, rows and columns; this {space.class_name} "
            f"takes {' x '.join(map(str, least))} at least",
            parameter="shape",
        )


# In pixels; written into AutoencoderKLAllegro, which has its own size in its config.
ALLEGRO_FRAMES, ALLEGRO_OVERLAPS = 24, (8, 120, 80)


def check_covered(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> None:
    """Latents that Allegro's fixed tiles cover: what none covers stays black, silently."""
    size, frames = space.option("sample_size"), space.temporal_ratio or 1
    ratios = frames, space.ratio, space.ratio
    kernel = tuple(edge // ratio for edge, ratio in zip((ALLEGRO_FRAMES, size, size), ratios, strict=True))
    strides = [tile - overlap // ratio for tile, overlap, ratio in zip(kernel, ALLEGRO_OVERLAPS, ratios, strict=True)]
    for name, edge, tile, stride in zip(("frames", "rows", "columns"), latents.shape[2:], kernel, strides, strict=True):
        check_edge(f"The latents have {edge} {name}; {space.class_name} decodes", edge, tile, stride)


def check_edge(beginning: str, edge: int, tile: int, stride: int) -> None:
    """An edge that tiles of this size and stride cover to its end, in latents or pixels. Of one tile any stride will do."""
    if edge == tile or (edge > tile and stride > 0 and (edge - tile) % stride == 0):
        return
    more = f", {tile + stride}, {tile + 2 * stride}, ..." if stride > 0 else ""
    raise BadRequest(
        f"{beginning} in tiles that leave empty what they do not cover, and takes {tile}{more}", parameter="shape"
    )
