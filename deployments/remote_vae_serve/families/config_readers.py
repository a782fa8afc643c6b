"""Readers of a model's config: spatial and temporal compression ratio and latent channels, of config.json or of the model itself;
and latents_mean and latents_std that lie in its buffers, as tensors `[C]`."""

from __future__ import annotations

from inspect import getattr_static
from typing import Any

import torch

from remote_vae_serve.families.family import Config
from remote_vae_serve.families.latent_numbers import LatentNumbers


def halvings(*names: str) -> Any:
    """A reader of a compression ratio: 2 for each level after the first, of the first of these config entries that there is."""

    def number(config: Config, model: Any) -> int:
        levels = next(config[name] for name in names if config.get(name))
        return int(2 ** (len(levels) - 1))

    return number


def entry(name: str) -> Any:
    """A reader of a config entry, as an int."""
    return lambda config, model: int(config[name])


def said_by_model(name: str) -> Any:
    """A reader of a model's property, else of its config entry. Asked for what only the config has, a model warns: it is not
    asked."""

    def number(config: Config, model: Any) -> int:
        return int(config[name] if getattr_static(model, name, None) is None else getattr(model, name))

    return number


RATIO, FRAMES = said_by_model("spatial_compression_ratio"), said_by_model("temporal_compression_ratio")
Z_DIM, Z_CHANNELS = entry("z_dim"), entry("z_channels")


def ratio_of_tiny(config: Config, model: Any) -> int:
    """Pixels along an edge for each latent of AutoencoderTiny."""
    return int(config["upsampling_scaling_factor"] ** (len(config["decoder_block_out_channels"]) - 1))


def ratio_if_known(config: Config, model: Any) -> int:
    """Pixels along an edge for each latent of a class without a row; 8 where nothing says so."""
    if "block_out_channels" in config:
        return int(2 ** (len(config["block_out_channels"]) - 1))
    return int(getattr(model, "spatial_compression_ratio", 8))


def ratio_of_rae(config: Config, model: Any) -> int:
    """Pixels along an edge for each latent of RAE, whose encoder sees a picture of another size than its decoder makes."""
    side = config["encoder_input_size"] // config["encoder_patch_size"]
    return int(config["image_size"] // side)


def frames_of_wan(config: Config, model: Any) -> int:
    """Frames for each latent frame of Wan; 4 where its config does not say."""
    return int(config.get("scale_factor_temporal") or 4)


OF_BLOCKS = halvings("block_out_channels")


def buffers(model: Any, space: LatentNumbers) -> tuple[torch.Tensor, torch.Tensor]:
    """latents_mean and latents_std of a loaded model's buffers, float32."""
    return model.latents_mean.float(), model.latents_std.float()


def batch_norm(model: Any, space: LatentNumbers) -> tuple[torch.Tensor, torch.Tensor]:
    """Running mean and standard deviation of a loaded model's batch norm, the latter as the pipelines compute it of the
    variance."""
    return model.bn.running_mean, torch.sqrt(model.bn.running_var + space.option("batch_norm_eps"))
