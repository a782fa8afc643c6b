"""How a family's module is called, where that is more than `decode(latents)` or `encode(pixels)`.

Each takes the module, what goes in, the latent space and what the request says; `[B, C, (T,) h, w]` goes in and pixels come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from remote_vae.errors import BadRequest
from remote_vae_serve.layouts import Said

if TYPE_CHECKING:
    from remote_vae_serve.families import LatentSpace

Decode = Callable[[Any, torch.Tensor, "LatentSpace", Said], torch.Tensor]
Check = Callable[[torch.Tensor, "LatentSpace", Said], None]
"""Of latents as the decoder takes them, before they are near a device. Raises BadRequest."""
Encode = Callable[[Any, torch.Tensor], Any]
"""What an encoder gives of pixels: an object with `parameters`, `sample` and `mode`, or latents."""


def decode(model: Any, latents: torch.Tensor, space: LatentSpace, said: Said) -> torch.Tensor:
    made: torch.Tensor = model.decode(latents, return_dict=False)[0]
    return made


def decode_to_tensor(model: Any, latents: torch.Tensor, space: LatentSpace, said: Said) -> torch.Tensor:
    """VidTok has no `return_dict`."""
    made: torch.Tensor = model.decode(latents)
    return made


def decode_without_quantising(model: Any, latents: torch.Tensor, space: LatentSpace, said: Said) -> torch.Tensor:
    as_they_are = said.hints.force_not_quantize is not False
    made: torch.Tensor = model.decode(latents, force_not_quantize=as_they_are, return_dict=False)[0]
    return made


def decode_with_noise(model: Any, latents: torch.Tensor, space: LatentSpace, said: Said) -> torch.Tensor:
    """A decoder that denoises: of a seed it always draws the same."""
    made: torch.Tensor = model.decode(latents, generator=generator_of(said), return_dict=False)[0]
    return made


def schedule_on_host(model: Any) -> None:
    """Its steps are looked up in tables, by their numbers: few, and not on a device without values."""
    scheduler = model.decoder_scheduler
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps, device=None: set_timesteps(steps)


def decode_at_a_time(model: Any, latents: torch.Tensor, space: LatentSpace, said: Said) -> torch.Tensor:
    """LTX Video from 0.9.1 on mixes noise into its latents and is told how much; 0.9.1 draws more of it, from torch's global
    generator."""
    if not space.option("timestep_conditioning"):
        return decode(model, latents, space, said)
    step = _timestep(space, said)
    scale = latents.new_tensor(step if said.hints.decode_noise_scale is None else said.hints.decode_noise_scale)
    noise = torch.randn(latents.shape, generator=generator_of(said), dtype=latents.dtype).to(latents.device)
    mixed = (1 - scale) * latents + scale * noise
    with _global_draws_of(said, latents):
        made: torch.Tensor = model.decode(mixed, latents.new_full((len(latents),), step), return_dict=False)[0]
    return made


def decode_in_chunks(model: Any, latents: torch.Tensor, space: LatentSpace, said: Said) -> torch.Tensor:
    """The frames of each video as a batch, so many at a time: the decoder looks along them, so that the number moves pixels."""
    frames = latents.shape[2]
    together = said.hints.decode_chunk_size or frames
    videos = []
    for video in latents.transpose(1, 2):
        chunks = [video[start : start + together] for start in range(0, frames, together)]
        made = [model.decode(chunk, num_frames=len(chunk), return_dict=False)[0] for chunk in chunks]
        videos.append(torch.cat(made).transpose(0, 1))
    return torch.stack(videos)


def decode_in_tiles_always(model: Any, latents: torch.Tensor, space: LatentSpace, said: Said) -> torch.Tensor:
    """Allegro has no other decode. What comes out has the frames first."""
    if not model.use_tiling:
        model.enable_tiling()
    made = decode(model, latents, space, said).transpose(1, 2)
    return made if said.hints.num_frames is None else made[:, :, : said.hints.num_frames]


def encode_in_tiles_always(model: Any, pixels: torch.Tensor) -> Any:
    """Allegro has no other encode either, and leaves zeros where no tile comes."""
    if not model.use_tiling:
        model.enable_tiling()
    names = "frames", "rows", "columns"
    for name, edge, tile, stride in zip(names, pixels.shape[2:], model.kernel, model.stride, strict=True):
        _check_edge(f"The pixels have {edge} {name}; {type(model).__name__} encodes", edge, tile, stride)
    return encode(model, pixels)


def encode(model: Any, pixels: torch.Tensor) -> Any:
    encoded = model.encode(pixels)
    for name in ("latent_dist", "latents", "latent"):
        if (found := getattr(encoded, name, None)) is not None:
            return found
    if isinstance(encoded, tuple):  # VidTok with a codebook: what it chose, and its numbers
        return encoded[0]
    raise TypeError(f"{type(model).__name__}.encode gave a {type(encoded).__name__} without latents")


def check_nothing(latents: torch.Tensor, space: LatentSpace, said: Said) -> None:
    pass


def check_fours(latents: torch.Tensor, space: LatentSpace, said: Said) -> None:
    """VidTok's decoders that are not causal take frames four at a time, and drop what is left, silently."""
    if not space.option("is_causal") and latents.shape[2] % 4:
        raise BadRequest(
            f"The latents have {latents.shape[2]} frames; this {space.class_name}, which is not causal, takes multiples of 4",
            parameter="shape",
        )


def check_timestep(latents: torch.Tensor, space: LatentSpace, said: Said) -> None:
    if space.option("timestep_conditioning"):
        _timestep(space, said)


def _timestep(space: LatentSpace, said: Said) -> float:
    if said.hints.decode_timestep is None:
        raise BadRequest(
            f"This {space.class_name} is told how noisy its latents are: send decode_timestep (LTXPipeline's default is 0.0; the "
            "model cards have 0.05), and decode_noise_scale where it is another",
            parameter="decode_timestep",
        )
    return said.hints.decode_timestep


def check_square(latents: torch.Tensor, space: LatentSpace, said: Said) -> None:
    """RAE takes one form or the other, by its config, and of a grid a square."""
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


def check_clip(latents: torch.Tensor, space: LatentSpace, said: Said) -> None:
    """Of a video that is shorter than one clip MiniMax-H3 makes nothing."""
    clip, dropped = space.option("clip_length"), space.option("token_drop")
    least = -(-clip // (space.temporal_ratio or 1)) - dropped + 1 if dropped else 1
    if latents.shape[2] < least:
        raise BadRequest(
            f"The latents have {latents.shape[2]} frames; this {space.class_name} takes {least} at least",
            parameter="shape",
        )


def check_neighbours(latents: torch.Tensor, space: LatentSpace, said: Said) -> None:
    """Attention to neighbours takes no grid smaller than the neighbourhood, at the first stage nor at the last."""
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


def check_covered(latents: torch.Tensor, space: LatentSpace, said: Said) -> None:
    """What no tile of Allegro's covers stays black, and nobody is told."""
    size, frames = space.option("sample_size"), space.temporal_ratio or 1
    ratios = frames, space.ratio, space.ratio
    kernel = tuple(edge // ratio for edge, ratio in zip((ALLEGRO_FRAMES, size, size), ratios, strict=True))
    strides = [tile - overlap // ratio for tile, overlap, ratio in zip(kernel, ALLEGRO_OVERLAPS, ratios, strict=True)]
    for name, edge, tile, stride in zip(("frames", "rows", "columns"), latents.shape[2:], kernel, strides, strict=True):
        _check_edge(f"The latents have {edge} {name}; {space.class_name} decodes", edge, tile, stride)


def _check_edge(beginning: str, edge: int, tile: int, stride: int) -> None:
    """Raises BadRequest where tiles do not end where the edge does. Its own sizes need no stride that makes sense."""
    if edge == tile or (edge > tile and stride > 0 and (edge - tile) % stride == 0):
        return
    more = f", {tile + stride}, {tile + 2 * stride}, ..." if stride > 0 else ""
    raise BadRequest(
        f"{beginning} in tiles that leave empty what they do not cover, and takes {tile}{more}", parameter="shape"
    )


def generator_of(said: Said) -> torch.Generator | None:
    """On the CPU, of the request's seed; None for chance."""
    return None if said.hints.seed is None else torch.Generator("cpu").manual_seed(said.hints.seed)


@contextmanager
def _global_draws_of(said: Said, like: torch.Tensor) -> Iterator[None]:
    """What is drawn from torch's global generators in here is of the request's seed, and moves nobody else's draws."""
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        if said.hints.seed is not None:
            torch.manual_seed(said.hints.seed)
        yield
