"""The two ends of an encode: `signed_pixels`, the encoder's own pixels as a server takes them, and `encoder_output`, what the
`encode` of a diffusers autoencoder class returns, made of the tensor that the server sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, EncoderOutput, IdentityDistribution
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from remote_vae.errors import BrokenReply

OF_LATENTS = {"AutoencoderDC": EncoderOutput, "AutoencoderRAE": EncoderOutput, "VQModel": VQEncoderOutput}
"""Classes of diffusers whose encoder gives latents, and what they come in; AutoencoderTiny's else."""
DISTRIBUTIONS = {"AutoencoderKLCosmos": IdentityDistribution}
"""Of those whose encoder gives the parameters of a distribution, the ones that have another."""


def signed_pixels(pixels: torch.Tensor, scale: Sequence[float] | None, shift: Sequence[float] | None) -> torch.Tensor:
    """Pixels `[B, 3, (T,) H, W]` in the encoder's own range to [-1, 1]; see `ModelDescription.pixel_scale`. Raises BrokenReply
    where that does not fit them."""
    if scale is None or shift is None:
        return pixels
    if not len(scale) == len(shift) or len(scale) not in (1, pixels.shape[1]):
        raise BrokenReply(
            f"The server says pixel_scale {list(scale)} and pixel_shift {list(shift)} of {pixels.shape[1]} channels"
        )
    of_channels = [pixels.new_tensor(values).view(1, -1, *[1] * (pixels.ndim - 2)) for values in (scale, shift)]
    return pixels * of_channels[0] + of_channels[1]


def encoder_output(class_name: str, kind: str, tensor: torch.Tensor, batch: int, return_dict: bool) -> Any:
    """The output of `encode`.

    Args:
        batch: how many samples there are.
        class_name: of the model, in diffusers.
        kind: `moments` or `latents`: what the tensor is; see `ModelDescription.encode`.
        return_dict: False for a tuple.

    Returns:
        With `.latent_dist`, which is sampled here, with the caller's generator; of a model without a distribution with
        `.latents`, or `.latent` where its class calls it so.

    Raises:
        BrokenReply: the tensor is nothing of the kind.
    """
    is_gaussian = kind == "moments" and class_name not in DISTRIBUTIONS
    if tensor.ndim not in (4, 5) or len(tensor) != batch or (is_gaussian and tensor.shape[1] % 2):
        raise BrokenReply(f"The server's {kind} of {batch} samples have the shape {list(tensor.shape)}")
    if kind == "moments":
        distribution = DISTRIBUTIONS.get(class_name, DiagonalGaussianDistribution)(tensor)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)
    return OF_LATENTS.get(class_name, AutoencoderTinyOutput)(tensor) if return_dict else (tensor,)
