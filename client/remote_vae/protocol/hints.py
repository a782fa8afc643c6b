"""`Hints`: what neither the shape of the latents nor the model's config tells, and only who made the latents can say."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from remote_vae.errors import BadRequest
from remote_vae.protocol import parameters
from remote_vae.protocol.messages import Query
from remote_vae.protocol.parameters import Parameter, Values

Layout = Literal["channels_first", "channels_last", "frames_first"]
PatchOrder = Literal["c_ph_pw", "ph_pw_c"]
Plain = dict[str, int | float | str | bool]
MOST = 2**20

NUM_FRAMES = parameters.integer(
    "num_frames",
    "Frames of the video in pixels: of packed video latents (LTX), and where the video ends before its latents do (Allegro).",
    minimum=1, maximum=MOST,
)  # fmt: skip
LAYERS = parameters.integer(
    "layers", "Layers of a layered picture whose latents are packed (Qwen-Image-Layered).", minimum=1, maximum=MOST
)
DROP_FRAMES = parameters.integer(
    "drop_frames",
    "Leading latent frames that are no part of the video: reference images (Wan VACE), padding (CogVideoX 1.5).",
    minimum=0, maximum=MOST,
)  # fmt: skip
LAYOUT = parameters.choice(
    "layout",
    "Order of the latents' axes, where a shape has two readings; default is the model's own.",
    {name: name for name in get_args(Layout)},
)
PATCH_ORDER = parameters.choice(
    "patch_order",
    "Order of the values in a packed token: channel, row, column of the patch, or the channel last (Ideogram 4); default is "
    "the model's own.",
    {name: name for name in get_args(PatchOrder)},
)
DENORMALISED = parameters.boolean(
    "denormalised",
    "True where the latents are denormalised already (Flux.2 Klein, LTX-2): the model's own convention does nothing, its "
    "layout is still undone. Default False.",
)
SIGMA_DATA = parameters.number(
    "sigma_data",
    "Of the scheduler that made the latents (Cosmos), above 0; default is the model's own.",
    exclusiveMinimum=0,
)
DECODE_TIMESTEP = parameters.number(
    "decode_timestep",
    "How noisy a decoder takes its latents to be, 0 to 1 (LTX Video 0.9.1 and later); default is the model's own.",
    minimum=0, maximum=1,
)  # fmt: skip
DECODE_NOISE_SCALE = parameters.number(
    "decode_noise_scale",
    "How much noise is mixed into the latents of such a decoder, 0 to 1; default is decode_timestep.",
    minimum=0, maximum=1,
)  # fmt: skip
DECODE_CHUNK_SIZE = parameters.integer(
    "decode_chunk_size",
    "Frames decoded at a time (Stable Video Diffusion), which changes pixels; default is the model's own.",
    minimum=1, maximum=MOST,
)  # fmt: skip
FORCE_NOT_QUANTIZE = parameters.boolean(
    "force_not_quantize",
    "Of models with a codebook: True decodes the latents as they are, False the nearest of the codebook; default is the "
    "model's own.",
)
SEED = parameters.integer(
    "seed", "Of the noise: that which some decoders draw, and of an encode's sample.", minimum=0, maximum=2**63 - 1
)
PARAMETERS: tuple[Parameter[Any], ...] = (
    NUM_FRAMES, LAYERS, DROP_FRAMES, LAYOUT, PATCH_ORDER, DENORMALISED, SIGMA_DATA, DECODE_TIMESTEP, DECODE_NOISE_SCALE,
    DECODE_CHUNK_SIZE, FORCE_NOT_QUANTIZE, SEED,
)  # fmt: skip
ENCODE_PARAMETERS = tuple(parameter for parameter in PARAMETERS if parameter is not SEED)
"""An encode has a `seed` of its own."""


class EncodeHintArguments(TypedDict, total=False):
    """`Hints` as keyword arguments of `encode`."""

    num_frames: int | None
    layers: int | None
    drop_frames: int | None
    layout: Layout | None
    patch_order: PatchOrder | None
    denormalised: bool | None
    sigma_data: float | None
    decode_timestep: float | None
    decode_noise_scale: float | None
    decode_chunk_size: int | None
    force_not_quantize: bool | None


class HintArguments(EncodeHintArguments, total=False):
    """`Hints` as keyword arguments of `decode`."""

    seed: int | None


@dataclass(frozen=True)
class Hints:
    """What the shape and the config do not tell; None where nobody said it.

    Attributes:
        num_frames: frames of the video in pixels: of packed video latents (LTX), and of a crop (Allegro).
        layers: of layered pictures, packed (Qwen-Image-Layered).
        drop_frames: leading latent frames that are no part of the video (VACE's reference images, CogVideoX 1.5).
        layout: where a shape has two readings.
        patch_order: of the values of a packed token; Ideogram 4 has `ph_pw_c`.
        denormalised: the latents are denormalised already (Flux.2 Klein, LTX-2): the model's own convention does nothing, its
            layout is still undone.
        sigma_data: of the scheduler (Cosmos), above 0.
        decode_timestep: 0 to 1 (LTX Video 0.9.1 and later).
        decode_noise_scale: 0 to 1; where it is None, it is `decode_timestep`.
        decode_chunk_size: frames decoded at a time (Stable Video Diffusion); it changes pixels.
        force_not_quantize: of models with a codebook: whether the latents are decoded as they are.
        seed: 0 to 2**63 - 1, of decoders that draw noise. An encode has its own and does not read this one.

    Raises:
        BadRequest: naming the parameter.
    """

    num_frames: int | None = None
    layers: int | None = None
    drop_frames: int | None = None
    layout: Layout | None = None
    patch_order: PatchOrder | None = None
    denormalised: bool | None = None
    sigma_data: float | None = None
    decode_timestep: float | None = None
    decode_noise_scale: float | None = None
    decode_chunk_size: int | None = None
    force_not_quantize: bool | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for parameter in PARAMETERS:
            value = getattr(self, parameter.name)
            if value is not None:
                object.__setattr__(self, parameter.name, _checked(parameter, value))

    @classmethod
    def of(cls, values: Values) -> Hints:
        """What was sent. Raises BadRequest naming the parameter."""
        sent = {parameter.name: parameter.of(values) for parameter in PARAMETERS if parameter.name in values}
        return cls(**sent)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Hints:
        """From what `to_plain` gives, or a person wrote. Raises BadRequest naming the parameter; also one that is no hint."""
        known = [parameter.name for parameter in PARAMETERS]
        for name in plain:
            if name not in known:
                raise BadRequest(f"{name} is no hint; expected one of {', '.join(known)}", parameter=str(name))
        return cls(**plain)

    def given(self) -> tuple[str, ...]:
        """Names of what is not None, in the order of the fields."""
        return tuple(parameter.name for parameter in PARAMETERS if getattr(self, parameter.name) is not None)

    def to_plain(self) -> Plain:
        """What is said, by name: numbers, strings, booleans."""
        return {name: getattr(self, name) for name in self.given()}

    def to_query(self) -> Query:
        """What is said, as `of` reads it."""
        return [(name, str(value)) for name, value in self.to_plain().items()]

    def or_else(self, other: Hints) -> Hints:
        """What is said here, and of the rest what is said there."""
        if self == _NOTHING:
            return other
        return Hints(**{**other.to_plain(), **self.to_plain()})  # type: ignore[arg-type]  # each is of its own field


_NOTHING = Hints()


def _checked(parameter: Parameter[Any], value: Any) -> Any:
    """The value as a plain one of Python's, where it is what the parameter's schema says. Raises BadRequest."""
    schema = parameter.schema
    choices, kind = schema.get("enum"), schema["type"]
    if choices is not None:
        if isinstance(value, str) and value in choices:
            return value
        expected = f"one of {', '.join(choices)}"
    elif kind == "boolean":
        if isinstance(value, bool):
            return value
        expected = "True or False"
    else:
        plain = _number(kind, value)
        if plain is not None and _is_within(schema, plain):
            return plain
        expected = f"a {'whole ' if kind == 'integer' else ''}number {_bounds(schema)}"
    raise BadRequest(f"{parameter.name} is {value!r:.80}; expected {expected}", parameter=parameter.name)


def _number(kind: str, value: Any) -> float | None:
    """None where it is no finite number; a string and a boolean are none, however they read."""
    if isinstance(value, (str, bytes, bool)):
        return None
    try:
        number = operator.index(value) if kind == "integer" else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isinstance(number, int) or math.isfinite(number) else None


def _is_within(schema: Mapping[str, Any], number: float) -> bool:
    above = schema.get("exclusiveMinimum", -math.inf)
    return bool(schema.get("minimum", -math.inf) <= number <= schema.get("maximum", math.inf) and number > above)


def _bounds(schema: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f"above {schema['exclusiveMinimum']}"
    return f"from {schema['minimum']} to {schema['maximum']}"
