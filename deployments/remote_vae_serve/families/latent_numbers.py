"""`LatentNumbers`: latent channels, compression ratios, scaling_factor, shift_factor and statistics of one model, read from
its config and its buffers, not written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LatentNumbers:
    """The numbers of one model's latents, which layouts, scaling and decoders ask for.

    Attributes:
        channels: of the latents.
        ratio: pixels along an edge for each latent.
        scaling_factor, shift_factor, mean, std: as in its config (mean and std are latents_mean and latents_std, a value for each
            channel, or for each channel and frame); None where the model has none.
        force_upcast: the model overflows in float16.
        temporal_ratio: frames for each latent frame after the first, of a video model; else None.
        pixel_channels: what the encoder takes: 3, or 4 with alpha.
        decoder_options: entries of the config that the family's decoder asks for.
    """

    class_name: str
    channels: int
    ratio: int
    scaling_factor: float | None = None
    shift_factor: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    force_upcast: bool = False
    temporal_ratio: int | None = None
    pixel_channels: int = 3
    decoder_options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str) -> Any:
        """An entry of the config that the family names; None where it lacks it."""
        return dict(self.decoder_options).get(name)
