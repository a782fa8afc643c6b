"""What a model's config.json says, read with the diffusers class that it names, and the statistics in its buffers; no weight is
read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import diffusers
import torch

from remote_vae.errors import ModelFailed
from remote_vae_serve.engine.memory.estimate import on_meta
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.families.table import latent_space_of

MOST_STATISTICS = 4096
"""Numbers of a buffer that is told: those of one for each channel, and for each frame too (Cosmos 1)."""


def filled_in(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A model's config.json with its class's defaults in place of what it leaves out; no weight is read.

    Raises:
        ModelFailed: its class is no autoencoder of the installed diffusers.
    """
    name = config.get("_class_name") or ""
    model_class: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not hasattr(model_class, "decode"):
        raise ModelFailed(
            f"{source} holds a {str(name)[:80] or 'model of no class'}, which is no autoencoder of this diffusers "
            f"({diffusers.__version__}); is `subfolder` right?"
        )
    parameters = inspect.signature(model_class).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return defaults | {key: value for key, value in config.items() if key != "_name_or_path"}  # a path of somebody's


def latent_space(config: dict[str, Any], source: str, instead: Mapping[str, Any] = MappingProxyType({})) -> LatentSpace:
    """What a model's config.json says of its latents.

    Args:
        instead: entries to be taken for those of the file, as a pipeline does that has numbers of its own.

    Raises:
        ModelFailed: it does not say enough.
    """
    filled = filled_in(config, source)
    name = filled["_class_name"]
    try:
        graph = on_meta(getattr(diffusers, name), filled, torch.float32)
        space = latent_space_of(name, {**filled, **instead}, graph)
    except Exception as error:  # of a config that was made for another version a class raises what it pleases
        raise ModelFailed(
            f"{source} is a {name}, and its config does not fit that class of diffusers {diffusers.__version__}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    # Only what the file itself says: AutoencoderKL's default is True, and SD 1.5, which is fine in float16, leaves it out.
    return replace(space, force_upcast=bool(config.get("force_upcast", False)))


def statistics_of(model: torch.nn.Module) -> dict[str, tuple[float, ...]]:
    """The floating buffers of a model itself, and of its layers without weights (Flux.2's `bn`), by dotted name: pipelines read
    them off their VAE."""
    layers = [(f"{name}.", layer) for name, layer in model.named_children() if next(layer.parameters(), None) is None]
    owned = [("", model.named_buffers(recurse=False)), *((prefix, layer.named_buffers()) for prefix, layer in layers)]
    return {
        prefix + name: tuple(buffer.flatten().tolist())
        for prefix, buffers in owned
        for name, buffer in buffers
        if buffer.is_floating_point() and buffer.numel() <= MOST_STATISTICS
    }
