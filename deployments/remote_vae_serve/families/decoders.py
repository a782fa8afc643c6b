"""Decode and encode functions of the families: how a diffusers autoencoder is called, where its `decode` or `encode` alone
will not do.

Each decode takes the module, denormalized latents `[B, C, (T,) h, w]` in the module's dtype and on its device, the latent
space and the request's hints, and returns pixels `[B, C, (T,) H, W]` in the range of the family's `PixelRange`. Each encode
takes pixels `[B, C, (T,) H, W]` and returns a distribution or latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from remote_vae_serve.families.checks import check_edge, timestep_of
from remote_vae_serve.families.latent_numbers import LatentNumbers
from remote_vae_serve.families.layouts import RequestHints

Decode = Callable[[Any, torch.Tensor, LatentNumbers, RequestHints], torch.Tensor]
"""Module, latents, latent space and hints to pixels; see above. Raises BadRequest for a hint that is missing."""
Encode = Callable[[Any, torch.Tensor], Any]
"""What an encoder gives of pixels: an object with `parameters`, `sample` and `mode`, or latents."""


def decode(model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """`vae.decode(latents).sample`."""
    made: torch.Tensor = model.decode(latents, return_dict=False)[0]
    return made


def decode_to_tensor(model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """`vae.decode(latents)` that returns a tensor: VidTok has no `return_dict`."""
    made: torch.Tensor = model.decode(latents)
    return made


def decode_without_quantising(
    model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints
) -> torch.Tensor:
    """Decode latents of a model with a codebook (VQ) without quantization, unless the hint `force_not_quantize` is False."""
    as_they_are = hints.force_not_quantize is not False
    made: torch.Tensor = model.decode(latents, force_not_quantize=as_they_are, return_dict=False)[0]
    return made


def decode_with_noise(model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """Decode with a diffusion decoder, whose noise is drawn of the hint `seed`: for each sample by a generator of its own, as
    diffusers does where it is given a list."""
    generators = None if hints.seed is None else [generator_of(hints.of_sample(k)) for k in range(len(latents))]
    made: torch.Tensor = model.decode(latents, generator=generators, return_dict=False)[0]
    return made


def schedule_on_host(model: Any) -> None:
    """Keep a diffusion decoder's timesteps on the host: they are looked up in tables, by their numbers, which the meta device
    lacks."""
    scheduler = model.decoder_scheduler
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps, device=None: set_timesteps(steps)


def decode_at_a_time(model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """Decode with timestep conditioning: LTX Video from 0.9.1 on mixes noise into its latents by `decode_timestep` and
    `decode_noise_scale`; 0.9.1 draws more of it, from torch's global generator. Raises BadRequest without a `decode_timestep`."""
    if not space.option("timestep_conditioning"):
        return decode(model, latents, space, hints)
    step = timestep_of(space, hints)
    scale = latents.new_tensor(step if hints.decode_noise_scale is None else hints.decode_noise_scale)
    noise = torch.randn(latents.shape, generator=generator_of(hints), dtype=latents.dtype).to(latents.device)
    mixed = (1 - scale) * latents + scale * noise
    with _global_draws_of(hints, latents):
        made: torch.Tensor = model.decode(mixed, latents.new_full((len(latents),), step), return_dict=False)[0]
    return made


def decode_in_chunks(model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """Decode a video's frames in chunks of `decode_chunk_size`, each a batch (Stable Video Diffusion): the decoder looks along
    them, so that the number moves pixels."""
    frames = latents.shape[2]
    together = hints.decode_chunk_size or frames
    videos = []
    for video in latents.transpose(1, 2):
        chunks = [video[start : start + together] for start in range(0, frames, together)]
        made = [model.decode(chunk, num_frames=len(chunk), return_dict=False)[0] for chunk in chunks]
        videos.append(torch.cat(made).transpose(0, 1))
    return torch.stack(videos)


def decode_in_tiles_always(
    model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints
) -> torch.Tensor:
    """Decode with tiling: Allegro has no other decode. It returns frames first, which are transposed here, and cropped to
    `num_frames`."""
    if not model.use_tiling:
        model.enable_tiling()
    made = decode(model, latents, space, hints).transpose(1, 2)
    return made if hints.num_frames is None else made[:, :, : hints.num_frames]


def encode_in_tiles_always(model: Any, pixels: torch.Tensor) -> Any:
    """Encode with tiling: Allegro has no other encode either, and leaves zeros where no tile comes. Raises BadRequest for such
    a size."""
    if not model.use_tiling:
        model.enable_tiling()
    names = "frames", "rows", "columns"
    for name, edge, tile, stride in zip(names, pixels.shape[2:], model.kernel, model.stride, strict=True):
        check_edge(f"The pixels have {edge} {name}; {type(model).__name__} encodes", edge, tile, stride)
    return encode(model, pixels)


def encode(model: Any, pixels: torch.Tensor) -> Any:
    """`vae.encode(pixels)`: its `latent_dist`, where it has none its latents. Raises TypeError where it has neither."""
    encoded = model.encode(pixels)
    for name in ("latent_dist", "latents", "latent"):
        if (found := getattr(encoded, name, None)) is not None:
            return found
    if isinstance(encoded, tuple):  # VidTok with a codebook: what it chose, and its numbers
        return encoded[0]
    raise TypeError(f"{type(model).__name__}.encode gave a {type(encoded).__name__} without latents")


def generator_of(hints: RequestHints) -> torch.Generator | None:
    """A torch.Generator on the CPU, seeded with the hint `seed`; None, where there is none, for chance."""
    return None if hints.seed is None else torch.Generator("cpu").manual_seed(hints.seed)


@contextmanager
def _global_draws_of(hints: RequestHints, like: torch.Tensor) -> Iterator[None]:
    """Seed torch's global generators with the hint `seed` within, and restore them after: nobody else's draws are moved."""
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        if hints.seed is not None:
            torch.manual_seed(hints.seed)
        yield
