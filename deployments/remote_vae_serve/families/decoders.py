"""How a family's module is called, where that is more than `decode(latents)` or `encode(pixels)`.

Each takes the module, what goes in, the latent space and what the request says; `[B, C, (T,) h, w]` goes in and pixels come out.
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
"""Of latents as the decoder takes them, before they are near a device. Raises BadRequest."""
Encode = Callable[[Any, torch.Tensor], Any]
"""What an encoder gives of pixels: an object with `parameters`, `sample` and `mode`, or latents."""


def decode(model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    made: torch.Tensor = model.decode(latents, return_dict=False)[0]
    return made


def decode_to_tensor(model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """VidTok has no `return_dict`."""
    made: torch.Tensor = model.decode(latents)
    return made


def decode_without_quantising(
    model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints
) -> torch.Tensor:
    as_they_are = hints.force_not_quantize is not False
    made: torch.Tensor = model.decode(latents, force_not_quantize=as_they_are, return_dict=False)[0]
    return made


def decode_with_noise(model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """A decoder that denoises: of a seed it always draws the same."""
    made: torch.Tensor = model.decode(latents, generator=generator_of(hints), return_dict=False)[0]
    return made


def schedule_on_host(model: Any) -> None:
    """Its steps are looked up in tables, by their numbers: few, and not on a device without values."""
    scheduler = model.decoder_scheduler
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps, device=None: set_timesteps(steps)


def decode_at_a_time(model: Any, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """LTX Video from 0.9.1 on mixes noise into its latents and is told how much; 0.9.1 draws more of it, from torch's global
    generator."""
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
    """The frames of each video as a batch, so many at a time: the decoder looks along them, so that the number moves pixels."""
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
    """Allegro has no other decode. What comes out has the frames first."""
    if not model.use_tiling:
        model.enable_tiling()
    made = decode(model, latents, space, hints).transpose(1, 2)
    return made if hints.num_frames is None else made[:, :, : hints.num_frames]


def encode_in_tiles_always(model: Any, pixels: torch.Tensor) -> Any:
    """Allegro has no other encode either, and leaves zeros where no tile comes."""
    if not model.use_tiling:
        model.enable_tiling()
    names = "frames", "rows", "columns"
    for name, edge, tile, stride in zip(names, pixels.shape[2:], model.kernel, model.stride, strict=True):
        check_edge(f"The pixels have {edge} {name}; {type(model).__name__} encodes", edge, tile, stride)
    return encode(model, pixels)


def encode(model: Any, pixels: torch.Tensor) -> Any:
    encoded = model.encode(pixels)
    for name in ("latent_dist", "latents", "latent"):
        if (found := getattr(encoded, name, None)) is not None:
            return found
    if isinstance(encoded, tuple):  # VidTok with a codebook: what it chose, and its numbers
        return encoded[0]
    raise TypeError(f"{type(model).__name__}.encode gave a {type(encoded).__name__} without latents")


def generator_of(hints: RequestHints) -> torch.Generator | None:
    """On the CPU, of the request's seed; None for chance."""
    return None if hints.seed is None else torch.Generator("cpu").manual_seed(hints.seed)


@contextmanager
def _global_draws_of(hints: RequestHints, like: torch.Tensor) -> Iterator[None]:
    """What is drawn from torch's global generators in here is of the request's seed, and moves nobody else's draws."""
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        if hints.seed is not None:
            torch.manual_seed(hints.seed)
        yield
