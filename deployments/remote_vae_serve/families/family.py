"""`Family`: what is the same for autoencoders of one kind, as a row of data: diffusers classes, layouts, latent scaling,
decode and encode, tiling, dtype. The rows are in `images.py` and `videos.py`.

`LatentSpace` is one loaded model's numbers and its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from remote_vae.errors import BadRequest
from remote_vae_serve.families.checks import Check, check_nothing
from remote_vae_serve.families.decoders import Decode, Encode, decode, encode
from remote_vae_serve.families.latent_numbers import LatentNumbers
from remote_vae_serve.families.latent_scaling import SCALED, LatentScaling
from remote_vae_serve.families.layouts import Layout, Media, RequestHints
from remote_vae_serve.families.pixel_ranges import SIGNED, PixelRange

Tile = Callable[[Any, int, int], None]
Config = Mapping[str, Any]
Number = Callable[[Config, Any], "int | None"]
"""A number of a model, from its config and from the model itself, whose weights need not be there."""


@dataclass(frozen=True, kw_only=True)
class LatentSpace(LatentNumbers):
    """A model's latents: its numbers, and the family that says what to do with them."""

    family: Family

    @property
    def takes(self) -> tuple[str, ...]:
        """The hints that mean something to this model."""
        family = self.family
        of_layouts = [name for layout in family.layouts for name in layout.takes]
        named = [*of_layouts, *family.scaling.takes, *family.takes(self), "denormalized"]
        return tuple(dict.fromkeys(named))

    def with_statistics_of(self, model: Any) -> LatentSpace:
        """The same with the statistics that lie in a loaded model's buffers, where its family has them there."""
        if (statistics := self.family.statistics) is None or (found := statistics(model, self)) is None:
            return self
        mean, std = found
        return replace(self, mean=tuple(mean.flatten().tolist()), std=tuple(std.flatten().tolist()))


def nothing(space: LatentSpace) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Family:
    """A family of autoencoders: a row of the table.

    Attributes:
        name: for people: the models it is known by.
        classes: diffusers autoencoder classes.
        layouts: forms of latents, tried in order.
        channels, ratio, temporal_ratio: from the config, or from the model.
        scaling: what is done to latents before the decoder and after the encoder.
        statistics: mean and deviation that lie in buffers of a loaded model.
        range: what the decoder's numbers mean.
        decode, encode: how its module is called.
        check: what its decoder cannot take, or would spoil without a word.
        draws: its decoder draws noise: no two requests run as one batch.
        takes: the hints that its decoder reads.
        tile: turns the tiling of a module on, given the module, the size of a tile in pixels and the ratio; None has none.
        has_time: decoder and encoder have an axis for time; None where that is so of videos.
        any_frames: its encoder takes any number of frames, not 1 and a multiple of the ratio.
        has_distribution: its encoder gives a distribution to sample from, not latents.
        decodes_batches: its decoder makes of a batch what it makes of each sample, in less time.
        fps: frames a second of its videos where the request names none.
        cast_first: its pipelines cast latents to the decoder's dtype before they denormalize, not after.
        half: the half precision it is fit for on a GPU.
        bfloat16: what of it keeps 45 dB of float32 in bfloat16 (docs/models.md), so may run in it on a CPU.
        encoded: what the encoder gave, normalised, to the form in which its pipelines have it.
        recover: after an exception in a module that keeps state.
        options: entries of the config that `decode` and `check` ask for.
        without_values: makes the graph of a module on the meta device run, where it would look at values.
        hub: repositories of its models on the Hub.
    """

    name: str
    classes: tuple[str, ...]
    layouts: tuple[Layout, ...]
    ratio: Number
    channels: Number = lambda config, model: int(config["latent_channels"])
    temporal_ratio: Number = lambda config, model: None
    scaling: LatentScaling = SCALED
    statistics: Callable[[Any, LatentSpace], tuple[torch.Tensor, torch.Tensor] | None] | None = None
    range: PixelRange = SIGNED
    decode: Decode = decode
    encode: Encode = encode
    check: Check = check_nothing
    draws: bool = False
    takes: Callable[[LatentSpace], tuple[str, ...]] = nothing
    tile: Tile | None = None
    has_time: bool | None = None
    any_frames: bool = False
    has_distribution: bool = True
    decodes_batches: bool = True
    fps: float = 8.0
    cast_first: bool = False
    half: torch.dtype = torch.float16
    bfloat16: tuple[Literal["decode", "encode"], ...] = ()
    encoded: Callable[[torch.Tensor], torch.Tensor] | None = None
    recover: Callable[[Any], None] | None = None
    options: tuple[str, ...] = ()
    without_values: Callable[[Any], None] | None = None
    hub: tuple[str, ...] = ()

    def space(self, class_name: str, config: Config, model: Any = None) -> LatentSpace:
        """The latent space of a model of this family, from its config. Raises KeyError or AttributeError where an entry is
        missing.

        Args:
            model: of the class, with or without weights.
        """
        mean, std = config.get("latents_mean"), config.get("latents_std")
        channels = self.channels(config, model)
        assert channels is not None
        space = LatentSpace(
            family=self,
            class_name=class_name,
            channels=channels,
            ratio=int(self.ratio(config, model) or 1),
            scaling_factor=config.get("scaling_factor"),
            shift_factor=config.get("shift_factor"),
            mean=tuple(mean) if mean and std else None,
            std=tuple(std) if mean and std else None,
            force_upcast=bool(config.get("force_upcast", False)),
            temporal_ratio=self.temporal_ratio(config, model),
            pixel_channels=4 if 4 in (config.get("in_channels"), config.get("input_channels")) else 3,
            decoder_options=tuple((name, config[name]) for name in self.options if name in config),
        )
        return space

    def layout_of(self, latents: torch.Tensor, space: LatentSpace, hints: RequestHints) -> Layout:
        """The layout these latents have. Raises BadRequest naming those that would do."""
        for layout in self.layouts:
            if hints.layout in (None, layout.kind) and layout.fits(latents, space, hints):
                return layout
        expected = " or ".join(self.expected(space))
        asked = "" if hints.layout is None else f" with layout {hints.layout}"
        raise BadRequest(
            f"Latents of shape {list(latents.shape)}{asked} do not fit {space.class_name} ({self.name}); expected {expected}",
            parameter="shape",
        )

    def expected(self, space: LatentSpace) -> list[str]:
        """The shapes it takes, for people."""
        numbers = {"channels": space.channels, "doubled": 2 * space.channels, "patched": 4 * space.channels}
        return [layout.expects.format(**numbers) for layout in self.layouts]

    @property
    def media(self) -> Media:
        """Whether its autoencoders are for images or for videos."""
        return self.layouts[0].media

    @property
    def takes_time(self) -> bool:
        """Whether its encoder takes `[B, 3, T, H, W]`."""
        return self.media == "video" if self.has_time is None else self.has_time

    def safe_dtype(
        self, space: LatentSpace, device: str, has_bfloat16: Callable[[], bool] = lambda: False
    ) -> torch.dtype:
        """What `dtype: auto` means: on a GPU half precision, bfloat16 where float16 overflows; on a CPU float32, or bfloat16
        where its decodes keep 45 dB in it.

        Args:
            has_bfloat16: whether that is the faster on this CPU; asked only where it matters.
        """
        if device == "cpu":
            return torch.bfloat16 if "decode" in self.bfloat16 and has_bfloat16() else torch.float32
        return torch.bfloat16 if space.force_upcast and self.half is torch.float16 else self.half

    def safe_encode_dtype(
        self, space: LatentSpace, device: str, decodes_in: torch.dtype = torch.float32
    ) -> torch.dtype:
        """What `encode_dtype: auto` means: on a GPU as `safe_dtype`, but never bfloat16: an encode drifts in it where a decode
        does not (MS-SSIM 0.76 against 0.98, FastVideo issue 1472). On a CPU float32, or bfloat16 where it decodes in that and
        its encodes keep 45 dB."""
        if device == "cpu":
            return decodes_in if decodes_in is torch.bfloat16 and "encode" in self.bfloat16 else torch.float32
        safe = self.safe_dtype(space, device)
        return torch.float32 if safe is torch.bfloat16 else safe
