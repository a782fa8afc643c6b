"""`DecodeArguments`: what a pipeline hands to the `decode` of a diffusers autoencoder class, as a request carries it: latents and
hints.

Sources: `decode` of AutoencoderKLLTXVideo and AutoencoderKLLTX2Video (`temb`), AutoencoderKLTemporalDecoder (`num_frames`) and
VQModel (`force_not_quantize`) in diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from remote_vae.errors import BadRequest, BrokenReply

CARRIED = ("return_dict", "generator", "temb", "num_frames", "force_not_quantize")
"""Arguments that mean something here."""
FRAMES_FIRST = ("AutoencoderKLAllegro",)
"""Classes whose decoder gives `[B, T, 3, H, W]`."""


@dataclass(frozen=True)
class DecodeArguments:
    """One decode.

    Attributes:
        latents: `[B, C, h, w]` or `[B, C, T, h, w]`, ready for the decoder; of Stable Video Diffusion, whose frames are a batch
            `[B * T, C, h, w]`, by videos `[B, T, C, h, w]`.
        frames: that its frames were a batch: how many a video has; 0 for no.
        times: how noisy the decoder takes each sample to be, 0 to 1; None where it is not told.
        hints: for the server.
        return_dict: False for a tuple; None where the class gives the tensor itself.
        frames_first: the class gives frames before channels.
    """

    latents: torch.Tensor
    frames: int = 0
    times: tuple[float, ...] | None = None
    hints: dict[str, Any] = field(default_factory=dict)
    return_dict: bool | None = True
    frames_first: bool = False

    @classmethod
    def of(cls, class_name: str, latents: torch.Tensor, arguments: Mapping[str, Any], draws: bool) -> DecodeArguments:
        """From the arguments that `decode` of that class takes besides the latents.

        Args:
            draws: the decoder draws noise.

        Raises:
            BadRequest: one that does not fit the latents.
        """
        hints: dict[str, Any] = {}
        if "force_not_quantize" in arguments:
            hints["force_not_quantize"] = bool(arguments["force_not_quantize"])
        times, frames = (
            _times(arguments.get("temb"), len(latents)),
            _frames(arguments.get("num_frames", 0), len(latents)),
        )
        if times is not None:
            hints["decode_noise_scale"] = 0.0  # the pipeline has mixed its noise into them
        if frames:
            latents = latents.reshape(-1, frames, *latents.shape[1:])
            hints["decode_chunk_size"] = frames
        if draws and (generator := arguments.get("generator")) is not None:
            hints["seed"] = _seed(generator)
        return cls(latents, frames, times, hints, arguments.get("return_dict"), class_name in FRAMES_FIRST)

    def parts(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """The requests: one, unless its samples differ in how noisy they are."""
        if self.times is None:
            return [(self.latents, self.hints)]
        if len(set(self.times)) == 1:
            return [(self.latents, {**self.hints, "decode_timestep": self.times[0]})]
        return [
            (sample, {**self.hints, "decode_timestep": time})
            for sample, time in zip(torch.split(self.latents, 1), self.times, strict=True)
        ]

    def pixels(self, made: list[torch.Tensor]) -> torch.Tensor:
        """What the class's own `decode` gives, of what came back for the parts. Raises BrokenReply for what are no pixels of
        these latents."""
        for pixels in made:
            if (
                pixels.ndim not in (4, 5)
                or (self.frames and pixels.ndim == 4)
                or len(pixels) * len(made) != len(self.latents)
            ):
                raise BrokenReply(
                    f"The server's pixels for latents {list(self.latents.shape)} have the shape {list(pixels.shape)}"
                )
        pixels = made[0] if len(made) == 1 else torch.cat(made)
        if self.frames:
            return pixels.transpose(1, 2).flatten(0, 1)
        if self.latents.ndim > pixels.ndim:  # a server has no axis for the one frame of a picture
            return pixels.unsqueeze(2)
        return pixels.transpose(1, 2) if self.frames_first else pixels


def _seed(generator: Any) -> int:
    """A seed that the generator gives: the same for the same generator, another the next time."""
    one = generator[0] if isinstance(generator, (list, tuple)) and generator else generator
    if not isinstance(one, torch.Generator):
        raise BadRequest(f"generator is a {type(one).__name__}; expected a torch.Generator, or a list of them",
                         parameter="generator")  # fmt: skip
    return int(torch.randint(2**62, (1,), generator=one, device=one.device))


def _times(temb: Any, batch: int) -> tuple[float, ...] | None:
    if temb is None:
        return None
    times = tuple(torch.as_tensor(temb).flatten().tolist())
    if len(times) not in (1, batch):
        raise BadRequest(f"temb has {len(times)} values for {batch} samples; expected one each", parameter="temb")
    return times if len(times) == batch else times * batch


def _frames(count: Any, batch: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0 or (count and batch % count):
        raise BadRequest(
            f"num_frames is {count!r:.80}; expected a whole number that divides the {batch} frames",
            parameter="num_frames",
        )
    return count
