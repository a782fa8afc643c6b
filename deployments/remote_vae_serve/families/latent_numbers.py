"""`LatentNumbers`: latent channels, compression ratios, scaling_factor, shift_factor and statistics of one model, read from
its config and its buffers, not written down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LatentNumbers:
    """The numbers of one model's latents, which layouts, scaling and decoders ask for.

    Attributes:
        channels: of the latents.
        ratio: pixels along an edge for each latent.
        scaling_factor, shift_factor, mean, std: as in its config (mean and std are latents_mean and latents_std, a value for each
            channel, or for each channel and frame); None where the model has none. A factor and deviations other than 0.
        force_upcast: the model overflows in float16.
        temporal_ratio: frames for each latent frame after the first, of a video model; else None.
        pixel_channels: what the encoder takes: 3, or 4 with alpha.
        decoder_options: entries of the config that the family's decoder asks for.

    Raises:
        ValueError: a number that no latents can be computed with, naming it as the config does.
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

    def __post_init__(self) -> None:
        _check("scaling_factor", (self.scaling_factor,), other_than_0=True)
        _check("shift_factor", (self.shift_factor,))
        _check("latents_mean", _flat(self.mean or ()))
        _check("latents_std", _flat(self.std or ()), other_than_0=True)

    def option(self, name: str) -> Any:
        """An entry of the config that the family names; None where it lacks it."""
        return dict(self.decoder_options).get(name)


def _flat(numbers: Sequence[Any]) -> Iterator[Any]:
    """RAE has them for each channel and place, lists in lists."""
    for number in numbers:
        if isinstance(number, (list, tuple)):
            yield from _flat(number)
        else:
            yield number


def _check(name: str, numbers: Iterable[Any], other_than_0: bool = False) -> None:
    for number in numbers:
        if number is None:
            continue
        plain = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not plain or not math.isfinite(number) or (other_than_0 and number == 0):
            expected = f"finite numbers{' other than 0' if other_than_0 else ''}"
            raise ValueError(f"{name} of its config is or holds {number!r:.40}; expected {expected}")
