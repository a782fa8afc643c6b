"""`LatentScaling`: scaling of latents by scaling_factor, shift_factor, latents_mean and latents_std: denormalized as a family's
pipelines do before the decoder, normalized after the encoder.

The order of operations is the pipelines': it moves the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from remote_vae.errors import BadRequest
from remote_vae_serve.families.latent_numbers import LatentNumbers
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints, from_patches, to_patches

Formula = Callable[[torch.Tensor, LatentNumbers, RequestHints], torch.Tensor]


@dataclass(frozen=True)
class LatentScaling:
    """The latent scaling of a family: how to denormalize and how to normalize latents `[B, C, (T,) h, w]`.

    Attributes:
        words: the formula before the decoder, for people.
        formula: denormalizes, before the decoder.
        inverse: normalizes, after the encoder. Both keep shape and dtype.
        takes: the hints that it reads.
    """

    words: str
    formula: Formula
    inverse: Formula
    takes: tuple[str, ...] = ()

    def denormalize(self, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints = NO_HINTS) -> torch.Tensor:
        """Denormalize latents as the family's pipelines do before `vae.decode`.

        Args:
            latents: `[B, C, (T,) h, w]`, of a floating dtype.

        Returns:
            Latents of the same shape and dtype; as they are, where the hint `denormalized` says so.

        Raises:
            BadRequest: a hint that the formula needs is missing, or a size does not fit it.
        """
        return latents if hints.denormalized else self.formula(latents, space, hints)

    def normalize(self, latents: torch.Tensor, space: LatentNumbers, hints: RequestHints = NO_HINTS) -> torch.Tensor:
        """Normalize latents `[B, C, (T,) h, w]`, in their dtype, as image-to-image pipelines do after `vae.encode`; also where
        the family's text-to-image pipelines hand out latents that are denormalized. Raises BadRequest as `denormalize`."""
        return self.inverse(latents, space, hints)


def scale_and_shift(latents: torch.Tensor, factor: float | None, shift: float | None) -> torch.Tensor:
    """Denormalize latents of any shape: `z / scaling_factor + shift_factor`, in their dtype; what is None is left out."""
    scaled = latents if factor is None else latents / factor
    return scaled if shift is None else scaled + shift


def shift_and_scale(latents: torch.Tensor, factor: float | None, shift: float | None) -> torch.Tensor:
    """Normalize latents of any shape: `(z - shift_factor) * scaling_factor`, in their dtype; what is None is left out."""
    shifted = latents if shift is None else latents - shift
    return shifted if factor is None else shifted * factor


def _along_channels(values: tuple[float, ...], latents: torch.Tensor, space: LatentNumbers) -> torch.Tensor:
    """Statistics in the dtype of the latents and of a shape to broadcast over them: `[1, C, 1, 1]` or `[1, C, 1, 1, 1]`; of
    those that have a value for each frame too (Cosmos 1), `[1, C, T, 1, 1]`. Raises BadRequest where the latents have more
    frames."""
    tensor = torch.tensor(values, dtype=latents.dtype, device=latents.device)
    if len(values) == space.channels:
        return tensor.view(1, -1, *[1] * (latents.ndim - 2))
    frames = len(values) // space.channels
    if latents.shape[2] > frames:
        raise BadRequest(
            f"The latents have {latents.shape[2]} frames; the statistics of this {space.class_name} are for {frames} at "
            "most",
            parameter="shape",
        )
    return tensor.view(1, space.channels, -1, 1, 1)[:, :, : latents.shape[2]]


def _statistics(latents: torch.Tensor, space: LatentNumbers) -> tuple[torch.Tensor, torch.Tensor] | None:
    """latents_mean and latents_std, to broadcast over the latents; None where the model has none."""
    if space.mean is None or space.std is None:
        return None
    return _along_channels(space.mean, latents, space), _along_channels(space.std, latents, space)


def _from_either(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    if (known := _statistics(latents, space)) is None:
        return scale_and_shift(latents, space.scaling_factor, space.shift_factor)
    mean, std = known
    return latents * std / (space.scaling_factor or 1.0) + mean


def _to_either(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    if (known := _statistics(latents, space)) is None:
        return shift_and_scale(latents, space.scaling_factor, space.shift_factor)
    mean, std = known
    return (latents - mean) * (space.scaling_factor or 1.0) / std


def _to_unscaled(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """Normalize by the statistics alone: LTX's image-to-video pipelines leave the scaling_factor out where they encode."""
    known = _statistics(latents, space)
    assert known is not None
    mean, std = known
    return (latents - mean) * 1.0 / std


def _from_inverse(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    known = _statistics(latents, space)
    if known is None:
        return latents
    mean, std = known
    sigma = hints.sigma_data
    return latents / (1.0 / std) + mean if sigma is None else latents * std / sigma + mean


def _to_inverse(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    known = _statistics(latents, space)
    if known is None:
        return latents
    mean, std = known
    sigma = hints.sigma_data
    return (latents - mean) * (1.0 / std) if sigma is None else (latents - mean) * sigma / std


def _sigma(space: LatentNumbers, hints: RequestHints) -> float:
    if hints.sigma_data is None:
        raise BadRequest(
            f"{space.class_name} needs sigma_data, which its pipeline reads from its scheduler (0.5 for Cosmos 1); send it, or "
            "set it under `hints` of the application",
            parameter="sigma_data",
        )
    return hints.sigma_data


def _from_sigma(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    sigma, known = _sigma(space, hints), _statistics(latents, space)
    return latents / sigma if known is None else latents * known[1] / sigma + known[0]


def _to_sigma(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    sigma, known = _sigma(space, hints), _statistics(latents, space)
    return latents * sigma if known is None else (latents - known[0]) * sigma / known[1]


def _patched_statistics(space: LatentNumbers, hints: RequestHints, like: torch.Tensor) -> list[torch.Tensor]:
    """Mean and standard deviation `[1, 4C, 1, 1]` of 2 x 2 patches in the order (c, ph, pw), whatever the order of the tokens
    that they were counted on."""
    found = [torch.tensor(values or (), dtype=like.dtype, device=like.device) for values in (space.mean, space.std)]
    if hints.patch_order == "ph_pw_c":
        found = [values.view(2, 2, -1).permute(2, 0, 1).flatten() for values in found]
    return [values.view(1, -1, 1, 1) for values in found]


def _from_patches(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    if latents.shape[-1] % 2 or latents.shape[-2] % 2:
        raise BadRequest(
            f"The latents are {latents.shape[-2]} x {latents.shape[-1]}; {space.class_name} has 2 x 2 patches, so that both "
            "are even",
            parameter="shape",
        )
    mean, std = _patched_statistics(space, hints, latents)
    return from_patches(to_patches(latents) * std + mean)


def _to_patches(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    mean, std = _patched_statistics(space, hints, latents)
    return (to_patches(latents) - mean) / std


def _to_inverted(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """Normalize by the scaling_factor; CogVideoX 1.5 divides where it encodes an image, too
    (CogVideoXImageToVideoPipeline.prepare_latents)."""
    if space.option("invert_scale_latents"):
        return scale_and_shift(latents, space.scaling_factor, None)
    return _to_either(latents, space, hints)


def _to_rounded(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """Normalize what was rounded to float16: MiniMax-H3 was trained on latents that had been stored in it."""
    return _to_inverse(latents.to(torch.float16).to(latents.dtype), space, hints)


def _as_it_is(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    return latents


IDENTITY = LatentScaling("z", _as_it_is, _as_it_is)
SCALED = LatentScaling("z * std / scaling_factor + mean with statistics, else z / scaling_factor + shift_factor",
                    _from_either, _to_either)  # fmt: skip
SCALED_ONE_WAY = LatentScaling("z * std / scaling_factor + mean", _from_either, _to_unscaled)
INVERTED = LatentScaling("z / scaling_factor", _from_either, _to_inverted)
ROUNDED = LatentScaling("z * std + mean", _from_inverse, _to_rounded)
STATISTICS = LatentScaling("z * std + mean", _from_inverse, _to_inverse, ("sigma_data",))
OF_SIGMA = LatentScaling(
    "z * std / sigma_data + mean with statistics, else z / sigma_data", _from_sigma, _to_sigma, ("sigma_data",)
)
OF_PATCHES = LatentScaling(
    "z * sqrt(variance + eps) + mean, of a batch norm over 2 x 2 patches", _from_patches, _to_patches
)
