"""The arguments of the application builders, `ingress` and `vae`, as they stand under `args:` in serve_config.yaml: pydantic
models with every default. How Serve runs them (replicas, queues) is Serve's own business, under `deployments:`."""

from __future__ import annotations

import difflib
import os
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    PlainSerializer,
    field_validator,
    model_validator,
)

from remote_vae.errors import BadRequest
from remote_vae.protocol.hints import Hints
from remote_vae.ray_internals import OWN_THREAD_VARIABLE
from remote_vae_serve.allowed_origins import ANY, read_origins

DType = Literal["auto", "float16", "bfloat16", "float32"]
Device = Literal["auto", "cuda", "cpu"]
Reservation = Annotated[float, Field(ge=0, allow_inf_nan=False)]


INGRESS_DEPLOYMENT = "Ingress"
"""The deployment's name in Serve, in whichever application it is."""
ASIDE = 16
"""Of what Serve lets into a replica at a time (`max_ongoing_requests`), what is not for requests that are let in: questions of
what the model is, and requests that another replica has handed back, which are never refused."""


class Arguments(BaseModel):
    """Base of the builder arguments: frozen; of an unknown key the nearest known one is named, a former name is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        names = {name: name for name in cls.model_fields} | cls._former_names()
        mistakes = []
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
                hint = f"did you mean {names[near[0]]!r}?" if near else f"known are {', '.join(cls.model_fields)}"
                mistakes.append(f"unknown argument {key!r}; {hint}")
        values = dict(values)
        for former, name in cls._former_names().items():
            if former in values and name in values and values.pop(former) != values[name]:
                mistakes.append(f"{name} and its former name {former} differ; leave out {former}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return values

    @classmethod
    def _former_names(cls) -> dict[str, str]:
        """Names of arguments by what they were called before: the choices of `validation_alias` after the first."""
        return {
            str(former): name
            for name, field in cls.model_fields.items()
            if isinstance(field.validation_alias, AliasChoices)
            for former in field.validation_alias.choices[1:]
        }


class DoorConfig(Arguments):
    """Arguments of the HTTP app, in the ingress and at a model's own path alike."""

    max_body_mib: float = Field(256, gt=0, description="Largest request body, in MiB; larger ones get a 413.")
    max_bodies_mib: float = Field(
        1024,
        gt=0,
        description="All request bodies that one process holds at a time, in MiB; one for which there is no room gets a 503.",
    )
    request_timeout_s: float = Field(
        300,
        gt=0,
        validation_alias=AliasChoices("request_timeout_s", "deadline_s"),
        description="Seconds after which a request gets a 504.",
    )

    trusted_proxies: tuple[Annotated[IPvAnyNetwork, PlainSerializer(str)], ...] = Field(
        (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")),
        description="Networks of proxies in front whose X-Forwarded-For says who asks; clients share a queue fairly.",
    )

    allow_origins: tuple[str, ...] = Field(
        (),
        description="Origins of pages that may use the server from a browser (CORS), such as https://page.example, or `*`; none "
        "if unset.",
    )

    @field_validator("allow_origins", mode="before")
    @classmethod
    def _as_browsers_send_them(cls, written: Any) -> Any:
        origins = [written] if written == ANY else written
        if not isinstance(origins, (list, tuple)) or not all(isinstance(origin, str) for origin in origins):
            raise ValueError(f"allow_origins is {written!r}; expected a list such as [https://page.example], or '*'")
        return read_origins(origins)

    @property
    def max_body(self) -> int:
        return int(self.max_body_mib * 2**20)

    @property
    def max_bodies(self) -> int:
        return int(self.max_bodies_mib * 2**20)

    @property
    def proxies(self) -> tuple[str, ...]:
        return tuple(map(str, self.trusted_proxies))

    @property
    def deadline_s(self) -> float:
        """The former name of `request_timeout_s`."""
        return self.request_timeout_s

    @property
    def has_connections(self) -> bool:
        """Whether the process that answers has the clients' connections itself, as under `run --haproxy`, or Serve's proxy."""
        return os.environ.get(OWN_THREAD_VARIABLE) == "0"


class IngressConfig(DoorConfig):
    """Arguments of `remote_vae_serve.app:ingress`."""

    models: tuple[str, ...] | None = Field(
        None, description="Serve only these applications; all VAEs of the cluster if unset."
    )
    hosts: dict[str, str] = Field(
        default_factory=dict,
        description="Host name to model: a POST to / with that Host decodes with that model, for clients that know the "
        "host of an endpoint and no path.",
    )
    placement_wait_s: float = Field(
        14,
        gt=0,
        description="Seconds for which a request waits, once it is known that the model's first replica lacks resources that "
        "others keep, before it is answered with a 503 that says so. It waits on where all of them give up what they hold "
        "after a turn no longer than this.",
    )
    num_cpus: Reservation = Field(0.1, description="CPUs that Ray reserves for the replica.")


class FakeEngineConfig(Arguments):
    """A stand-in that makes pixels without a model: for load tests and for tests of the service around it."""

    decode_s: float = Field(
        0.0, ge=0, description="Seconds to wait in each decode, as a busy GPU would; the GIL is free."
    )
    channels: int = Field(4, gt=0, description="Channels of the latents it takes.")
    seconds_per_megapixel: float = Field(
        0.0, ge=0, description="Seconds to wait on top, for each million pixels (2**20) that the latents make."
    )
    pixels: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = Field(
        None,
        description="Height and width of one picture, made once, that it hands over whatever the latents are; as uint8 it "
        "costs nothing. If unset, the picture is made of the latents.",
    )


class VAEConfig(DoorConfig):
    """Arguments of `remote_vae_serve.app:vae`: one model. Body and deadline are for its own path, if it has one."""

    source: str = Field(description="Hub id, local folder, or `demo` for the bundled weights.")
    subfolder: str | None = Field(None, description="Folder of the VAE inside the source, e.g. `vae`.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    variant: str | None = Field(None, description="Variant of the weights, e.g. `fp16`.")
    dtype: DType = Field(
        "auto",
        description="What the decoder runs in; `auto` is the family's safe choice on the device. On a CPU that is float32, or "
        "bfloat16 where the processor is faster in it and the family keeps 45 dB (docs/models.md).",
    )
    encode_dtype: DType = Field(
        "auto",
        description="What the encoder runs in; `auto` never is bfloat16 on a GPU; on a CPU it is, where the decoder runs "
        "in that and the family's encodes keep 45 dB. Where it is not `dtype`, a second copy of the weights is loaded at the "
        "first encode.",
    )
    device: Device = Field("auto", description="`auto` is cuda where Ray assigned a GPU, else cpu.")
    num_gpus: Literal["auto"] | Reservation = Field(
        "auto", description="GPUs a replica reserves; `auto` (for one machine) is 1 if a live node has a GPU, else 0."
    )
    num_cpus: float = Field(
        0.1,
        ge=0,
        description="CPUs that Ray reserves for a replica; from 1 on it has as many threads on a CPU, rounded down.",
    )
    engine: Literal["auto", "fast", "eager"] = Field(
        "auto",
        description="How the model is run: `eager` as diffusers wrote it, `fast` with its operations fused; `auto` is fast on a "
        "processor.",
    )
    memory: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        "auto",
        description="What a replica may use of its device, weights included: a share up to 1, else GiB; `auto` is all of it, or "
        "its share of the GPU, less a reserve. What does not fit is decoded in tiles.",
    )
    warm_up: tuple[tuple[Annotated[int, Field(gt=0)], ...], ...] = Field(
        (), description="Shapes of latents to decode before the replica is ready, e.g. [[1, 4, 128, 128]]."
    )
    max_requests: int = Field(
        128,
        gt=0,
        description="Requests that a replica holds at a time, those that wait included; a client may have as many of them as "
        "are free.",
    )
    batching: Literal["auto", "off"] = Field(
        "auto",
        description="`auto` decodes requests of one shape that wait together as one batch; `off` gives pixels that do not "
        "depend on the neighbours, to the last place.",
    )
    hints: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="What only a human can say of this model's latents (docs/models.md), for requests that do not say it, e.g. "
        "{sigma_data: 0.5}.",
    )
    config: dict[str, float | int | bool] = Field(
        default_factory=dict,
        description="Numbers that this model's pipeline takes for those of its config.json, e.g. {shift_factor: 0} for "
        "Kandinsky 5.",
    )
    threads: int | None = Field(
        None,
        gt=0,
        description="Torch's threads; if unset as many as num_cpus, or where that is below 1 the CPUs that the container may "
        "use, divided among the replicas on them that are at work. The last place of float32 depends on their number.",
    )
    retry_s: float = Field(30, gt=0, description="Seconds after which a model that could not be loaded is tried again.")
    fake: FakeEngineConfig | None = Field(None, description="Use the fake engine instead of the source's weights.")

    @field_validator("batching", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, batching: Any) -> Any:
        """YAML reads a bare `off` as False."""
        return "off" if batching is False else batching

    @field_validator("subfolder")
    @classmethod
    def _inside_the_source(cls, subfolder: str | None) -> str | None:
        if subfolder is not None and (subfolder.startswith("/") or ".." in subfolder.split("/")):
            raise ValueError(f"subfolder is {subfolder!r}; expected a folder inside the source, such as vae")
        return subfolder

    @field_validator("hints")
    @classmethod
    def _known_hints(cls, hints: dict[str, Any]) -> dict[str, Any]:
        try:
            return Hints.from_plain(hints).to_plain()
        except BadRequest as error:
            raise ValueError(error.message) from None
