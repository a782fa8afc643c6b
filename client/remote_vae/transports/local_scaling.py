"""Latent scaling of the local fallback: by factors that a request gives, or by what a diffusers autoencoder has for it."""

from __future__ import annotations

from typing import Any

from remote_vae.errors import BadRequest
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.wire import Scaling

COSMOS = "AutoencoderKLCosmos"
UNSCALED = ("VQModel",)
"""Whose pipelines scale by nothing, whatever its config says."""
STATISTICS = ("latents_mean", "latents_std")


def denormalize(latents: Any, vae: Any, scaling: Scaling, hints: Hints) -> Any:
    """Latents `[B, C, (T,) h, w]` as the decoder takes them, in their dtype: `z * std / factor + mean`, or `z / factor + shift`.
    Raises BadRequest where a hint is missing."""
    if scaling.own and hints.denormalized:
        return latents
    factor, shift, statistics = _numbers(latents, vae, scaling, hints)
    if statistics is not None:
        mean, std, _ = statistics
        return latents * std / (factor or 1.0) + mean
    scaled = latents if factor is None else latents / factor
    return scaled if shift is None else scaled + shift


def normalize(latents: Any, vae: Any, scaling: Scaling, hints: Hints) -> Any:
    """What the encoder gave as pipelines take it: `(z - mean) * factor / std`, or `(z - shift) * factor`; also where they hand
    out latents that are denormalized. Raises BadRequest where a hint is missing."""
    factor, shift, statistics = _numbers(latents, vae, scaling, hints)
    if statistics is not None:
        mean, std, in_buffers = statistics
        # LTX's pipelines, which have them there, leave the factor out where they encode.
        return (latents - mean) * (1.0 if in_buffers else factor or 1.0) / std
    shifted = latents if shift is None else latents - shift
    return shifted if factor is None else shifted * factor


def _numbers(latents: Any, vae: Any, scaling: Scaling, hints: Hints) -> tuple[Any, Any, tuple[Any, Any, bool] | None]:
    """Factor, shift and statistics; None for what there is not."""
    name, config = type(vae).__name__, vae.config
    if not scaling.own:
        return scaling.factor, scaling.shift, None
    if name in UNSCALED:
        return None, None, None
    if name == COSMOS and hints.sigma_data is None:
        raise BadRequest(
            f"{COSMOS} needs sigma_data, which its pipeline reads from its scheduler", parameter="sigma_data"
        )
    if hints.sigma_data is not None:  # stands where other models have their factor
        return hints.sigma_data, None, _statistics(latents, vae)
    return getattr(config, "scaling_factor", None), getattr(config, "shift_factor", None), _statistics(latents, vae)


def _statistics(latents: Any, vae: Any) -> tuple[Any, Any, bool] | None:
    """Mean and standard deviation, to broadcast over the latents, and whether they lie in the module's buffers; None where it
    has none. Cosmos 1 has some for each frame, too."""
    import torch

    found = [getattr(vae.config, name, None) for name in STATISTICS]
    in_buffers = not all(found)
    if in_buffers:
        found = [vars(vae).get("_buffers", {}).get(name) for name in STATISTICS]
    if any(values is None for values in found):
        return None
    shape = (1, latents.shape[1], -1, *[1] * (latents.ndim - 3))
    mean, std = (
        torch.as_tensor(values, dtype=latents.dtype, device=latents.device).reshape(shape)[:, :, : latents.shape[2]]
        for values in found
    )
    return mean, std, in_buffers
