"""`LocalDecoder`: a diffusers autoencoder called as its pipelines call it, by the hints of a request; for the local fallback,
which has no table of families."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from remote_vae.errors import BadRequest
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.output import Output
from remote_vae.protocol.request import Request
from remote_vae.protocol.tensors import to_torch

FRAMES_FIRST = ("AutoencoderKLCogVideoX", "AutoencoderKLTemporalDecoder")
"""Whose pipelines hand out `[B, T, C, h, w]`."""
OF_SIGMA = ("AutoencoderKLCosmos", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "AutoencoderKLWan")
"""Whose pipelines may scale by their scheduler's sigma_data."""
TOKENS = ("AutoencoderKLLTX2Video", "AutoencoderKLLTXVideo")
"""Whose packed latents are a token for each latent pixel of each frame."""
DRAWING = ("ConsistencyDecoderVAE", "LTX2VideoDiffusionDecoderModel")
"""Whose decoders draw noise; others have a `generator` for show."""
ALLEGRO = "AutoencoderKLAllegro"
OTHER_SCALING = ("AutoencoderKLFlux2",)
"""Whose pipelines scale by what no config says: a batch norm over patches."""
OTHER_RANGE = ("AutoencoderKLMiniMaxH3", "AutoencoderRAE", "Kandinsky6SRVAE")
"""Whose pixels are none of [-1, 1]."""
OTHER_ENCODED = ("AutoencoderKLCogVideoX", "AutoencoderKLHunyuanImageRefiner")
"""Whose pipelines rearrange what they encode."""


class LocalDecoder:
    """A decoder of latents, in this process.

    Args:
        vae: an autoencoder of diffusers.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self.name = type(vae).__name__

    def lost(self, request: Request) -> list[str]:
        """Names of the hints of a request that would be lost here: it is to be refused."""
        kept = self._kept_of_latents(request) if isinstance(request, DecodeRequest) else self._kept_of_pixels(request)
        return [name for name in request.hints.given() if name not in kept]

    def is_strange(self, request: Request) -> bool:
        """Whether the answer depends on what is not known here of the autoencoder's family."""
        if isinstance(request, DecodeRequest):
            scaled, shown = request.scaling.own and not request.hints.denormalized, request.output is not Output.PT
        else:
            scaled, shown = request.scaling.own, True
            if self.name in OTHER_ENCODED:
                return True
        return (scaled and self.name in OTHER_SCALING) or (shown and self.name in OTHER_RANGE)

    def _kept_of_pixels(self, request: EncodeRequest) -> set[str]:
        layout = {"layout"} if request.hints.layout in ("channels_first", "channels_last") else set()
        return {"denormalized"} | layout | ({"sigma_data"} if self.name in OF_SIGMA else set())

    def _kept_of_latents(self, request: DecodeRequest) -> set[str]:
        accepted = inspect.signature(self._vae.decode).parameters
        axes = len(request.latents.shape)
        packed = axes == 3 and None not in (request.height, request.width)
        kept = {
            "num_frames": (packed and self.name in TOKENS) or self.name == ALLEGRO,
            "drop_frames": axes == 5 and self.is_for_videos,
            "layout": axes == 5,
            "patch_order": packed and not self.is_for_videos,
            "denormalized": True,
            "sigma_data": self.name in OF_SIGMA,
            "decode_timestep": self._is_told_the_time,
            "decode_noise_scale": self._is_told_the_time,
            "decode_chunk_size": "num_frames" in accepted,
            "force_not_quantize": "force_not_quantize" in accepted,
            "seed": True,  # of what draws nothing every seed makes the same
        }
        return {name for name, is_kept in kept.items() if is_kept}

    @property
    def is_for_videos(self) -> bool:
        """Whether it takes an axis for time; by its weights, or where those are a transformer's by its config."""
        has_time = bool(getattr(self._vae.config, "temporal_compression_ratio", None))
        return has_time or any(weight.ndim == 5 for weight in self._vae.parameters())

    @property
    def ratio(self) -> int:
        """Pixels along an edge for one latent."""
        places = (self._vae.config, self._vae)
        known = next((ratio for one in places if (ratio := getattr(one, "spatial_compression_ratio", None))), None)
        return int(known or 2 ** (len(getattr(self._vae.config, "block_out_channels", (0,) * 4)) - 1))

    @property
    def _is_told_the_time(self) -> bool:
        return bool(getattr(self._vae.config, "timestep_conditioning", False))

    def unpack(self, request: DecodeRequest) -> Any:
        """The latents as the decoder takes them, `[B, C, h, w]` or `[B, C, T, h, w]`, not scaled yet. Raises BadRequest."""
        latents, hints = to_torch(request.latents), request.hints
        if latents.ndim == 5:
            ordered = self._in_order(latents, hints)
            if hints.drop_frames and hints.drop_frames >= ordered.shape[2]:
                raise BadRequest(f"drop_frames is {hints.drop_frames}, and the latents have {ordered.shape[2]} frames",
                                 parameter="drop_frames")  # fmt: skip
            return ordered[:, :, hints.drop_frames or 0 :]
        if latents.ndim != 3:
            return latents
        if request.height is None and request.width is None:
            return latents[None]
        if request.height is None or request.width is None:
            raise BadRequest("Packed latents need height and width, both, in pixels",
                             parameter="height" if request.height is None else "width")  # fmt: skip
        try:
            if self.name in TOKENS:
                return self._frames_of_tokens(latents, request.height, request.width, hints)
            return self._of_patches(latents, request.height, request.width, hints)
        except RuntimeError:
            raise BadRequest("height and width do not fit the number of packed latents", parameter="height") from None

    def _in_order(self, latents: Any, hints: Hints) -> Any:
        layout = hints.layout
        if layout is None and self.name in FRAMES_FIRST and latents.shape[2] == self._vae.config.latent_channels:
            layout = "frames_first"
        if layout == "channels_last":
            made = latents.permute(0, 4, 1, 2, 3)
            return made if self.is_for_videos or made.shape[2] > 1 else made[:, :, 0]
        return latents.transpose(1, 2) if layout == "frames_first" else latents

    def _frames_of_tokens(self, latents: Any, height: int, width: int, hints: Hints) -> Any:
        if hints.num_frames is None:
            raise BadRequest(f"Packed latents of {self.name} need num_frames too", parameter="num_frames")
        frames = (hints.num_frames - 1) // self._vae.temporal_compression_ratio + 1
        grid = (len(latents), frames, height // self.ratio, width // self.ratio, -1)
        if latents.shape[1] != grid[1] * grid[2] * grid[3]:
            raise RuntimeError
        return latents.reshape(grid).permute(0, 4, 1, 2, 3)

    def _of_patches(self, latents: Any, height: int, width: int, hints: Hints) -> Any:
        rows, columns = (size // (2 * self.ratio) for size in (height, width))
        if hints.patch_order == "ph_pw_c":
            patches = latents.view(len(latents), rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
        else:
            patches = latents.view(len(latents), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(len(latents), -1, rows * 2, columns * 2)

    def decode(self, latents: Any, hints: Hints) -> Any:
        """Pixels `[B, C, (T,) H, W]` of denormalized latents of the module's dtype and device. Raises BadRequest."""
        accepted = inspect.signature(self._vae.decode).parameters
        said: dict[str, Any] = {}
        if "num_frames" in accepted:
            return self._in_chunks(latents, hints)
        if self._is_told_the_time:
            return self._at_a_time(latents, hints)
        if "force_not_quantize" in accepted:  # as they are unless someone says otherwise, as on a server
            said["force_not_quantize"] = hints.force_not_quantize is not False
        if self.name in DRAWING and hints.seed is not None:
            said["generator"] = [_generator_of(hints.of_sample(number)) for number in range(len(latents))]
        made = self._vae.decode(latents, return_dict=False, **said)[0]
        return made.transpose(1, 2)[:, :, : hints.num_frames] if self.name == ALLEGRO else made

    def _in_chunks(self, latents: Any, hints: Hints) -> Any:
        import torch

        made = []
        for video in latents.transpose(1, 2):
            chunks = video.split(hints.decode_chunk_size or len(video))
            frames = [self._vae.decode(chunk, num_frames=len(chunk), return_dict=False)[0] for chunk in chunks]
            made.append(torch.cat(frames).transpose(0, 1))
        return torch.stack(made)

    def _at_a_time(self, latents: Any, hints: Hints) -> Any:
        """LTX Video from 0.9.1 on: each sample by itself, with noise of its own mixed in."""
        import torch

        step = hints.decode_timestep
        if step is None:
            raise BadRequest(f"This {self.name} is told how noisy its latents are: send decode_timestep",
                             parameter="decode_timestep")  # fmt: skip
        scale = latents.new_tensor(step if hints.decode_noise_scale is None else hints.decode_noise_scale)
        made = []
        for number, latent in enumerate(latents.split(1)):
            own = hints.of_sample(number)
            noise = torch.randn(latent.shape, generator=_generator_of(own), dtype=latent.dtype).to(latent.device)
            mixed = (1 - scale) * latent + scale * noise
            with _global_draws_of(own, latent.device):
                made.append(self._vae.decode(mixed, latent.new_full((1,), step), return_dict=False)[0])
        return torch.cat(made)


def _generator_of(hints: Hints) -> Any:
    """A torch.Generator on the CPU, seeded with the hint `seed`; None, where there is none, for chance."""
    import torch

    return None if hints.seed is None else torch.Generator("cpu").manual_seed(hints.seed)


@contextmanager
def _global_draws_of(hints: Hints, device: Any) -> Iterator[None]:
    """Seed torch's global generators with the hint `seed` within, and restore them after: LTX 0.9.1 draws from them."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if hints.seed is not None:
            torch.manual_seed(hints.seed)
        yield
