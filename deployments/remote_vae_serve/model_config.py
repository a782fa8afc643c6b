"""What a model's config.json says, read with the diffusers class that it names; no weight is read."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import diffusers

from remote_vae.errors import ModelFailed
from remote_vae_serve.families import LatentSpace


def filled_in(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A model's config.json with its class's defaults in place of what it leaves out; no weight is read.

    Raises:
        ModelFailed: its class is no autoencoder of the installed diffusers.
    """
    name = config.get("_class_name", "")
    model_class: Any = getattr(diffusers, name, None)
    if not hasattr(model_class, "decode"):
        raise ModelFailed(
            f"{source} holds a {name or 'model of no class'}, which is no autoencoder of this diffusers "
            f"({diffusers.__version__}); is `subfolder` right?"
        )
    parameters = inspect.signature(model_class).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return defaults | {key: value for key, value in config.items() if key != "_name_or_path"}  # a path of somebody's


def latent_space(config: dict[str, Any], source: str) -> LatentSpace:
    """What a model's config.json says of its latents. Raises ModelFailed where it does not."""
    filled = filled_in(config, source)
    name = filled["_class_name"]
    try:
        # Only what the file itself says: AutoencoderKL's default is True, and SD 1.5, which is fine in float16, leaves it out.
        return replace(LatentSpace.of(name, filled), force_upcast=bool(config.get("force_upcast", False)))
    except (KeyError, TypeError) as error:
        raise ModelFailed(
            f"{source} is a {name}, whose config does not say its {error}; it cannot be served yet"
        ) from error
