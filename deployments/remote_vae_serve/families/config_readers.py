"""Where a model's numbers stand: the ratio of pixels to latents, channels and frames, in its config or in the model itself; and
statistics that lie in its buffers."""

from __future__ import annotations

from inspect import getattr_static
from typing import Any

import torch

from remote_vae_serve.families.family import Config
from remote_vae_serve.families.latent_numbers import LatentNumbers


def halvings(*names: str) -> Any:
    """2 for each level after the first, of whichever of these entries a config has."""

    def number(config: Config, model: Any) -> int:
        levels = next(config[name] for name in names if config.get(name))
        return int(2 ** (len(levels) - 1))

    return number


def entry(name: str) -> Any:
    return lambda config, model: int(config[name])


def said_by_model(name: str) -> Any:
    """What a model computes goes before its config. Asked for what only the config has, a model warns, so it is not asked."""

    def number(config: Config, model: Any) -> int:
        return int(config[name] if getattr_static(model, name, None) is None else getattr(model, name))

    return number


RATIO, FRAMES = said_by_model("spatial_compression_ratio"), said_by_model("temporal_compression_ratio")
Z_DIM, Z_CHANNELS = entry("z_dim"), entry("z_channels")


def ratio_of_tiny(config: Config, model: Any) -> int:
    return int(config["upsampling_scaling_factor"] ** (len(config["decoder_block_out_channels"]) - 1))


def ratio_if_known(config: Config, model: Any) -> int:
    if "block_out_channels" in config:
        return int(2 ** (len(config["block_out_channels"]) - 1))
    return int(getattr(model, "spatial_compression_ratio", 8))


def ratio_of_rae(config: Config, model: Any) -> int:
    side = config["encoder_input_size"] // config["encoder_patch_size"]
    return int(config["image_size"] // side)


def frames_of_wan(config: Config, model: Any) -> int:
    return int(config.get("scale_factor_temporal") or 4)


OF_BLOCKS = halvings("block_out_channels")


def buffers(model: Any, space: LatentNumbers) -> tuple[torch.Tensor, torch.Tensor]:
    return model.latents_mean.float(), model.latents_std.float()


def batch_norm(model: Any, space: LatentNumbers) -> tuple[torch.Tensor, torch.Tensor]:
    """The deviation as the pipelines compute it of the variance."""
    return model.bn.running_mean, torch.sqrt(model.bn.running_var + space.option("batch_norm_eps"))
