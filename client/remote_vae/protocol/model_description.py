"""`ModelDescription`: what a server says of a model, as a noun. Its fields are declared here, once: how each is written, its
type, its meaning. Whoever describes a model, reads a description, or documents one goes by them.

On the wire a description is a JSON object, and through a Ray handle a dict of plain values. What nobody knows is left out of it:
of a model that sleeps, all that only a replica can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from remote_vae.errors import BrokenReply

State = Literal["cold", "starting", "ready", "failed"]


def _said(meaning: str, *, name: str = "", required: bool = False, nullable: bool = False, **schema: Any) -> Any:
    """A field.

    Args:
        meaning: for people, with its unit and its range.
        name: on the wire; that of the attribute if "".
        required: it is in every description of a server.
        nullable: null is one of its values, and means something.
        schema: words of JSON schema that its type does not say.
    """
    about = {"meaning": meaning, "name": name, "required": required, "nullable": nullable, "schema": schema}
    return field(default=None, metadata=about)


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A model as its server describes it; None where the server does not say.

    Attributes:
        nulls: fields that the server says are null (`encode`, of a model without an encoder), and does not merely leave out.
        extra: what a newer server says besides.

    `FIELDS` has the meaning of the others.
    """

    protocol: int | None = _said("Version of what crosses a Ray handle; client and replica must have the same.")
    source: str | None = _said("Hub id or local folder of the weights, or `demo`.")
    subfolder: str | None = _said("Folder of the VAE inside the source; left out where it is the source itself.")
    revision: str | None = _said(
        "What identifies the weights: the Hub's commit, `bundled`, or empty for a local folder. Before a replica has run, the "
        "branch, tag or commit that the application asks for."
    )
    variant: str | None = _said("Variant of the weights, such as `fp16`; left out where none is asked for.")
    dtype: str | None = _said(
        "What the decoder runs in: `float16`, `bfloat16` or `float32`. Before a replica has run, what the application asks for, "
        "which may be `auto`."
    )
    encode_dtype: str | None = _said("What the encoder runs in; else as `dtype`.")
    device: str | None = _said(
        "What a replica runs on, `cpu` or `cuda`. Before one has run, what the application asks for, which may be `auto`."
    )
    num_gpus: float | str | None = _said(
        "GPUs that Ray reserves for a replica, 0 or more, a share of one included. `auto` where the application asks for that "
        "and could not be deployed.",
        minimum=0,
    )
    name: str | None = _said("Name of the Serve application, which is that of the path.", required=True)
    state: str | None = _said(
        "Whether it can answer: `cold`, `starting`, `ready` or `failed`.", required=True, enum=get_args(State)
    )
    reason: str | None = _said("Why it is in this state; left out where there is nothing to say.")
    replicas: int | None = _said("Replicas that answer, 1 or more, where the ingress says it.", minimum=1)
    ahead: int | None = _said(
        "Requests before the one whose `x-request-id` the query `waiting` names, 0 or more, as far as the door that answers can "
        "tell; left out where that request is not with it.",
        minimum=0,
    )
    startup: Mapping[str, float] | None = _said(
        "How long the replica took to start: `began`, seconds since 1970; `imports_s` and `weights_s`, seconds."
    )
    gpu_ids: tuple[int | str, ...] | None = _said("GPUs that Ray assigned to the replica; empty on a CPU.")
    encode: str | None = _said(
        "What its encoder gives: `moments` of a distribution to sample from, or `latents`; null where it has no encoder.",
        nullable=True,
        enum=("moments", "latents"),
    )
    class_name: str | None = _said("Class of diffusers that the autoencoder is of.", name="class")
    family: str | None = _said("The models that it is one of, as docs/models.md calls them.")
    latents: tuple[str, ...] | None = _said("Shapes of the latents that it takes, for people.")
    latent_channels: int | None = _said("Channels of the latents, 1 or more.", minimum=1)
    spatial_ratio: int | None = _said("Pixels along an edge for each latent, 1 or more.", minimum=1)
    temporal_ratio: int | None = _said(
        "Frames for each latent frame after the first, 1 or more; null for images.", nullable=True, minimum=1
    )
    video: bool | None = _said("Whether it makes videos.")
    scaling_factor: float | None = _said(
        "Of the model's own convention, z / scaling_factor + shift_factor; null where its config has none.",
        nullable=True,
    )
    shift_factor: float | None = _said("See `scaling_factor`; null where its config has none.", nullable=True)
    pixel_scale: tuple[float, ...] | None = _said(
        "Of what the decoder puts out and the encoder takes: pixel * pixel_scale + pixel_shift is in [-1, 1]. One number for all "
        "channels or one for each; left out where it is in that range itself."
    )
    pixel_shift: tuple[float, ...] | None = _said("See `pixel_scale`.")
    hints: Mapping[str, str] | None = _said("The hints that mean something to this model, with what each means.")
    application_hints: Mapping[str, bool | int | float | str] | None = _said(
        "The hints that the application sets, for requests that do not say them."
    )
    config: Mapping[str, Any] | None = _said("The autoencoder's config.json, the defaults of its class filled in.")
    buffers: Mapping[str, tuple[float, ...]] | None = _said(
        "Statistics of the latents that pipelines read off the autoencoder itself, such as `latents_mean` or `bn.running_mean`, "
        "in its dtype; left out where it has none."
    )
    nulls: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nulls", frozenset(name for name in self.nulls if getattr(self, name) is None))

    @classmethod
    def from_plain(cls, plain: Any) -> ModelDescription:
        """From what a server of any version said. Types are checked, words are not: a newer server may know one more.

        Raises:
            BrokenReply: naming the field that is of the wrong type.
        """
        if not isinstance(plain, Mapping):
            raise BrokenReply(f"The server describes a model as {plain!r:.80}; expected an object")
        values: dict[str, Any] = {}
        nulls, extra = set(), {}
        for name, value in plain.items():
            known = _BY_NAME.get(name)
            if known is None:
                extra[name] = value
                continue
            if not _fits(value, known.schema):
                raise BrokenReply(
                    f"The server says of a model that its {name} is {value!r:.80}; expected {known.kind}: bring client and "
                    "server to one version of remote-vae"
                )
            if value is None:
                nulls.add(known.attribute)
            values[known.attribute] = tuple(value) if isinstance(value, list) else value
        return cls(**values, nulls=frozenset(nulls), extra=extra)

    def to_plain(self) -> dict[str, Any]:
        """What is said, by its name on the wire: strings, numbers, booleans, None, and lists and dicts of them."""
        said = {known.name: _plain(getattr(self, known.attribute)) for known in FIELDS if self._says(known)}
        return said | dict(self.extra)

    def or_else(self, other: ModelDescription) -> ModelDescription:
        """What is said here, and of the rest what is said there."""
        said = {known.attribute: getattr(self, known.attribute) for known in FIELDS if self._says(known)}
        nulls = self.nulls | (other.nulls - said.keys())
        return replace(other, **said, nulls=nulls, extra={**other.extra, **self.extra})

    def _says(self, known: DescriptionField) -> bool:
        return getattr(self, known.attribute) is not None or known.attribute in self.nulls


@dataclass(frozen=True)
class DescriptionField:
    """One field of `ModelDescription`, as documents have it.

    Attributes:
        attribute: its name in Python; `name` on the wire.
        meaning: for people, with its unit and its range.
        required: it is in every description of a server.
        schema: JSON schema of its value, derived from its type.
    """

    attribute: str
    name: str
    meaning: str
    required: bool
    schema: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Its type in the words of JSON schema: `integer or null`, `array of string`."""
        return _kind(self.schema)


def model_schema() -> dict[str, Any]:
    """JSON schema of a description, derived from the fields."""
    return {
        "type": "object",
        "required": [known.name for known in FIELDS if known.required],
        "properties": {known.name: {**known.schema, "description": known.meaning} for known in FIELDS},
    }


_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}


_CLASSES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (NoneType,),
    "array": (list, tuple), "object": (Mapping,),
}  # fmt: skip


def _schema_of(annotation: Any) -> dict[str, Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return {}
    if origin is tuple:
        return {"type": "array", "items": _schema_of(arguments[0])}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1])}
    if origin in (Union, UnionType):
        said = [one for one in arguments if one is not NoneType]  # None stands for what is left out
        return _schema_of(said[0]) if len(said) == 1 else {"type": [_TYPES[one] for one in said]}
    return {"type": _TYPES[annotation]}


def _field_of(attribute: str, annotation: Any, about: Mapping[str, Any]) -> DescriptionField:
    schema = _schema_of(annotation) | {
        word: list(value) if isinstance(value, tuple) else value for word, value in about["schema"].items()
    }
    if about["nullable"]:
        schema["type"] = [schema["type"], "null"]
        if "enum" in schema:
            schema["enum"] = [*schema["enum"], None]
    return DescriptionField(attribute, about["name"] or attribute, about["meaning"], about["required"], schema)


_ANNOTATIONS = get_type_hints(ModelDescription)
FIELDS = tuple(
    _field_of(one.name, _ANNOTATIONS[one.name], one.metadata) for one in fields(ModelDescription) if one.metadata
)
"""What a description can hold, in the order in which it is written."""
NULLABLE = frozenset(known.attribute for known in FIELDS if "null" in known.schema["type"])
"""Fields of which null is a value."""
_BY_NAME = {known.name: known for known in FIELDS}


def _types_of(schema: Mapping[str, Any]) -> list[str]:
    types = schema.get("type", [])
    return types if isinstance(types, list) else [types]


def _kind(schema: Mapping[str, Any]) -> str:
    kind = " or ".join(_types_of(schema))
    inner = schema.get("items") or schema.get("additionalProperties")
    return f"{kind} of {_kind(inner)}" if inner else kind


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether the value, and all that is in it, is of the schema's type."""
    if not schema:
        return True  # no look inside: how deep it goes is its sender's choice
    if not any(_is(value, kind) for kind in _types_of(schema)):
        return False
    if isinstance(value, Mapping):
        return all(_fits(one, schema.get("additionalProperties", {})) for one in value.values())
    return not isinstance(value, (list, tuple)) or all(_fits(one, schema.get("items", {})) for one in value)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):  # which Python takes for an integer
        return kind == "boolean"
    return isinstance(value, _CLASSES[kind])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
