"""`Hints`: request parameters for what neither the shape of the latents nor the model's config tells, only who made them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from remote_vae.errors import BadRequest
from remote_vae.protocol import parameters
from remote_vae.protocol import plain as read
from remote_vae.protocol.messages import Query
from remote_vae.protocol.parameters import Parameter, Values

if TYPE_CHECKING:
    from typing_extensions import Self

Layout = Literal["channels_first", "channels_last", "frames_first"]
PatchOrder = Literal["c_ph_pw", "ph_pw_c"]
Plain = dict[str, int | float | str | bool]
MOST = 2**20
SEEDS = 2**63


class EncodeHintArguments(TypedDict, total=False):
    """`Hints` as keyword arguments of `encode`: for type checkers and editors, which take no computed TypedDict. A test holds it
    to `Hints`; an alias of a hint stands beside it."""

    num_frames: int | None
    layers: int | None
    drop_frames: int | None
    layout: Layout | None
    patch_order: PatchOrder | None
    denormalized: bool | None
    denormalised: bool | None
    sigma_data: float | None
    decode_timestep: float | None
    decode_noise_scale: float | None
    decode_chunk_size: int | None
    force_not_quantize: bool | None


class HintArguments(EncodeHintArguments, total=False):
    """`Hints` as keyword arguments of `decode`."""

    seed: int | None


def _hint(
    declare: Callable[..., Parameter[Any]], meaning: str, *details: Any, aliases: tuple[str, ...] = (), **bounds: float
) -> Any:
    """A field of `Hints`, None unless given, that is also the request parameter of its name: see `PARAMETERS`."""

    def parameter(name: str) -> Parameter[Any]:
        return replace(declare(name, meaning, *details, **bounds), aliases=aliases)

    return field(default=None, metadata={"parameter": parameter})


@dataclass(frozen=True)
class Hints:
    """Hints of one request, each declared here once: its type, meaning and bounds. None where it is not given.

    Raises:
        BadRequest: a value that its schema does not allow, naming the parameter.
    """

    num_frames: int | None = _hint(
        parameters.integer,
        "Frames of the video in pixels: of packed video latents (LTX), and where the video ends before its latents do (Allegro).",
        minimum=1,
        maximum=MOST,
    )
    layers: int | None = _hint(
        parameters.integer,
        "Layers of a layered picture whose latents are packed (Qwen-Image-Layered).",
        minimum=1,
        maximum=MOST,
    )
    drop_frames: int | None = _hint(
        parameters.integer,
        "Leading latent frames that are no part of the video: reference images (Wan VACE), padding (CogVideoX 1.5).",
        minimum=0,
        maximum=MOST,
    )
    layout: Layout | None = _hint(  # noqa: RUF009
        parameters.choice,
        "Order of the latents' axes, where a shape has two readings; default is the model's own.",
        {name: name for name in get_args(Layout)},
    )
    patch_order: PatchOrder | None = _hint(  # noqa: RUF009
        parameters.choice,
        "Order of the values in a packed token: channel, row, column of the patch, or the channel last (Ideogram 4); default is "
        "the model's own.",
        {name: name for name in get_args(PatchOrder)},
    )
    denormalized: bool | None = _hint(
        parameters.boolean,
        "True where the latents are denormalized already (Flux.2 Klein, LTX-2): the model's own convention does nothing, its "
        "layout is still undone. Default False.",
        aliases=("denormalised",),  # its only name until diffusers' spelling was taken
    )
    sigma_data: float | None = _hint(
        parameters.number,
        "Of the scheduler that made the latents (Cosmos), above 0; default is the model's own.",
        exclusiveMinimum=0,
    )
    decode_timestep: float | None = _hint(
        parameters.number,
        "How noisy a decoder takes its latents to be, 0 to 1 (LTX Video 0.9.1 and later); default is the model's own.",
        minimum=0,
        maximum=1,
    )
    decode_noise_scale: float | None = _hint(
        parameters.number,
        "How much noise is mixed into the latents of such a decoder, 0 to 1; default is decode_timestep.",
        minimum=0,
        maximum=1,
    )
    decode_chunk_size: int | None = _hint(
        parameters.integer,
        "Frames decoded at a time (Stable Video Diffusion), which changes pixels; default is the model's own.",
        minimum=1,
        maximum=MOST,
    )
    force_not_quantize: bool | None = _hint(
        parameters.boolean,
        "Of models with a codebook: True decodes the latents as they are, False the nearest of the codebook; default is the "
        "model's own.",
    )
    seed: int | None = _hint(
        parameters.integer,
        "Of the noise: that which some decoders draw, and of an encode's sample. Sample k of a decode draws by seed + k.",
        minimum=0,
        maximum=SEEDS - 1,
    )

    def __post_init__(self) -> None:
        for parameter in PARAMETERS:
            value = getattr(self, parameter.name)
            if value is not None:
                object.__setattr__(self, parameter.name, _checked(parameter, value))

    @classmethod
    def of(cls, values: Values) -> Hints:
        """The hints of a query. Raises BadRequest naming the parameter."""
        return cls(**{parameter.name: parameter.of(values) for parameter in PARAMETERS})

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any]) -> Hints:
        """The hints of keyword arguments, aliases included. Raises TypeError for a name that is no hint, as a call does, and
        BadRequest for a value that is none."""
        return cls(**parameters.without_aliases(PARAMETERS, arguments))

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Hints:
        """From what `to_plain` or `to_wire` gives, or a person wrote. Raises BadRequest naming the parameter; also one that is no
        hint."""
        if not isinstance(plain, Mapping):
            raise BadRequest(f"hints are of type {type(plain).__name__}; expected a mapping by name", parameter="hints")
        canonical = parameters.without_aliases(PARAMETERS, plain)
        known = [parameter.name for parameter in PARAMETERS]
        for name in canonical:
            if name not in known:
                raise BadRequest(f"{name} is no hint; expected one of {', '.join(known)}", parameter=str(name))
        return cls(**canonical)

    def given(self) -> tuple[str, ...]:
        """Names of the hints that are not None, in the order of the fields."""
        return tuple(parameter.name for parameter in PARAMETERS if getattr(self, parameter.name) is not None)

    def to_plain(self) -> Plain:
        """The hints that are given, by name: numbers, strings, booleans."""
        return {name: getattr(self, name) for name in self.given()}

    def to_wire(self) -> Plain:
        """As `to_plain`, each under the name that servers of any version know: see `Parameter.wire_name`."""
        given = self.given()
        return {one.wire_name: getattr(self, one.name) for one in PARAMETERS if one.name in given}

    def to_query(self) -> Query:
        """The hints that are given, as `of` reads them."""
        return [(name, str(value)) for name, value in self.to_wire().items()]

    def of_sample(self, number: int) -> Self:
        """The hints of one sample by its place in the batch, from 0: its seed is `seed + number`, after the largest 0 again. So
        samples draw different noise, and the same however the batch is split."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % SEEDS)

    def or_else(self, other: Hints) -> Hints:
        """These hints, with those of `other` where one is not given here."""
        if self == _NOTHING:
            return other
        return Hints(**{**other.to_plain(), **self.to_plain()})  # type: ignore[arg-type]  # each is of its own field


PARAMETERS: tuple[Parameter[Any], ...] = tuple(one.metadata["parameter"](one.name) for one in fields(Hints))
"""The hints as request parameters, in the order of the fields."""
ENCODE_PARAMETERS = tuple(parameter for parameter in PARAMETERS if parameter.name != "seed")
"""An encode has a `seed` of its own."""
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
        plain = read.as_integer(value) if kind == "integer" else read.as_number(value)
        if plain is not None and _is_within(schema, plain):
            return plain
        expected = f"a {'whole ' if kind == 'integer' else ''}number {_bounds(schema)}"
    raise BadRequest(f"{parameter.name} is {value!r:.80}; expected {expected}", parameter=parameter.name)


def _is_within(schema: Mapping[str, Any], number: float) -> bool:
    above = schema.get("exclusiveMinimum", -math.inf)
    return bool(schema.get("minimum", -math.inf) <= number <= schema.get("maximum", math.inf) and number > above)


def _bounds(schema: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f"above {schema['exclusiveMinimum']}"
    return f"from {schema['minimum']} to {schema['maximum']}"
