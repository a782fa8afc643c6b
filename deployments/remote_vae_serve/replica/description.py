"""What a replica says of its model, without Ray: of its arguments, and of the engine once that is loaded. Knows no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remote_vae.protocol.hints import PARAMETERS
from remote_vae.protocol.model_description import NULLABLE, ModelDescription
from remote_vae.protocol.wire import PROTOCOL
from remote_vae_serve.config import VAEConfig

if TYPE_CHECKING:
    from remote_vae_serve.engine.base import Engine


def describe_arguments(config: VAEConfig) -> ModelDescription:
    """What can be said of a model without a replica of it."""
    return ModelDescription(
        protocol=PROTOCOL,
        source=config.source,
        subfolder=config.subfolder,
        revision=config.revision,
        variant=config.variant,
        dtype=config.dtype,
        encode_dtype=config.encode_dtype,
        device=config.device,
        num_gpus=config.num_gpus,
    )


def describe_engine(engine: Engine) -> ModelDescription:
    """What only a loaded model tells."""
    space = engine.space
    pixels = space.family.range
    return ModelDescription(
        device=engine.device,
        dtype=str(engine.dtype).removeprefix("torch."),
        encode_dtype=str(engine.encode_dtype).removeprefix("torch."),
        encode=engine.encodes,
        revision=engine.revision,
        class_name=space.class_name,
        family=space.family.name,
        latents=tuple(space.family.expected(space)),
        latent_channels=space.channels,
        spatial_ratio=space.ratio,
        temporal_ratio=space.temporal_ratio,
        video=space.family.media == "video",
        scaling_factor=space.scaling_factor,
        shift_factor=space.shift_factor,
        pixel_scale=None if pixels.to_signed is None else pixels.scale,
        pixel_shift=None if pixels.to_signed is None else pixels.shift,
        hints={parameter.name: parameter.meaning for parameter in PARAMETERS if parameter.name in space.takes},
        application_hints=engine.hints.to_plain(),
        config=engine.model_config,
        buffers=engine.buffers or None,
        nulls=NULLABLE,
    )
