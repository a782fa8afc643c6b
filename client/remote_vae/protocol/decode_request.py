"""`DecodeRequest`: latents and the output that is asked for; how it is serialized for HTTP and for a Ray handle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from remote_vae.errors import BadRequest, UnknownContentType
from remote_vae.protocol import parameters
from remote_vae.protocol import plain as read
from remote_vae.protocol.hints import PARAMETERS as HINTS
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.messages import Message, Query, Transfer, deadline_headers, to_base64
from remote_vae.protocol.output import TENSOR, Output
from remote_vae.protocol.parameters import Parameter, Values
from remote_vae.protocol.tensors import LATENT_DTYPES, RawTensor
from remote_vae.protocol.wire import PROTOCOL, SCALING, SHAPE, Scaling, check_protocol

DTYPE = parameters.text("dtype", "dtype of the latents.", LATENT_DTYPES)
OUTPUT_TYPE = parameters.choice(
    "output_type",
    "pil (default) is an image or, where Accept says tensor/*, floats in [0, 1]; pt is what the decoder puts out; mp4 a video.",
    {"pil": "pil", "pt": "pt", "mp4": "mp4"},
)
PARTIAL_POSTPROCESS = parameters.boolean(
    "partial_postprocess", "With output_type=pt: uint8 pixels, [B, H, W, 3] or [T, H, W, 3]. Default False."
)
IMAGE_FORMAT = parameters.choice(
    "image_format", "Of an image; default is what Accept says, else jpg.", {"jpg": "jpg", "jpeg": "jpg", "png": "png"}
)
HEIGHT = parameters.integer("height", "Pixels; for packed latents only.")
WIDTH = parameters.integer("width", "Pixels; for packed latents only.")
FPS = parameters.number("fps", "Frames a second of an mp4, 1 to 240; default is the model's own rate.")
PARAMETERS: tuple[Parameter[Any], ...] = (
    SHAPE, DTYPE, OUTPUT_TYPE, PARTIAL_POSTPROCESS, IMAGE_FORMAT, *SCALING, HEIGHT, WIDTH, FPS, *HINTS,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """One decode, checked as far as it can be without knowing the model.

    Attributes:
        latents: float16, float32 or bfloat16.
        height, width: pixels; for packed latents only.
        fps: frames a second of an mp4; None for the family's own.
        hints: what the shape and the config do not tell.
        body, reply: how tensors are written over HTTP; a handle does not care.
        deadline_s: seconds for which the client waits, from the moment of sending; None where it does not say.
        client: who asks, of those that share the model's queue; a server says it of what comes by HTTP, a transport by handle.

    Raises:
        BadRequest: naming the parameter.
    """

    latents: RawTensor
    scaling: Scaling = field(default_factory=Scaling)
    output: Output = Output.JPEG
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    hints: Hints = field(default_factory=Hints)
    body: Transfer = "binary"
    reply: Transfer = "binary"
    deadline_s: float | None = None
    client: str = ""

    verb: ClassVar[str] = "decode"

    def __post_init__(self) -> None:
        if self.latents.dtype not in LATENT_DTYPES:
            raise BadRequest(
                f"dtype is {self.latents.dtype!r}; latents are one of {', '.join(LATENT_DTYPES)}", parameter="dtype"
            )
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and not 1 <= size <= 1 << 20:
                raise BadRequest(f"{name} is {size}; expected a number of pixels", parameter=name)
        if self.fps is not None and not 1 <= self.fps <= 240:
            raise BadRequest(f"fps is {self.fps:g}; expected 1 to 240", parameter="fps")
        for name, transfer in (("input_tensor_type", self.body), ("output_tensor_type", self.reply)):
            if transfer not in ("binary", "base64"):
                raise BadRequest(f"{name} is {transfer!r}; expected binary or base64", parameter=name)

    def samples(self) -> list[DecodeRequest]:
        """A request for each sample of the batch, of the noise that it draws in the batch."""
        return [
            replace(self, latents=sample, hints=self.hints.of_sample(number))
            for number, sample in enumerate(self.latents.samples())
        ]

    def to_plain(self) -> tuple[Any, ...]:
        """For a Ray handle: numpy view, strings, numbers, None; no class of ours, no torch tensor."""
        return (
            PROTOCOL, self.latents.data, self.latents.dtype, self.latents.shape,
            self.scaling.to_plain(), self.output.value, self.height, self.width, self.fps, self.hints.to_wire(), self.deadline_s,
            self.client,
        )  # fmt: skip

    @classmethod
    def from_plain(cls, plain: tuple[Any, ...]) -> DecodeRequest:
        """From what `to_plain` gives. Raises BadRequest naming what is wrong, or ProtocolMismatch."""
        check_protocol(plain, "client")
        _, data, dtype, shape, scaling, output, height, width, fps, hints, deadline_s, client = read.fields(
            plain, 12, "request"
        )
        return cls(
            latents=RawTensor(read.array(data, "latents"), read.text(dtype, "dtype"), read.sizes(shape, "shape")),
            scaling=Scaling.from_plain(scaling),
            output=read.member(Output)(output, "output_type"),
            height=read.optional(read.integer, height, "height"),
            width=read.optional(read.integer, width, "width"),
            fps=read.optional(read.number, fps, "fps"),
            hints=Hints.from_plain(hints),
            deadline_s=read.optional(read.number, deadline_s, "deadline_s"),
            client=read.text(client, "client"),
        )

    def to_http(self) -> tuple[Query, dict[str, str], bytes | memoryview]:
        """Query, headers and body of the POST."""
        query: Query = [("shape", str(size)) for size in self.latents.shape]
        query.append(("dtype", self.latents.dtype))
        query.append(("output_type", {Output.MP4: "mp4", Output.PT: "pt", Output.UINT8: "pt"}.get(self.output, "pil")))
        query.append(("partial_postprocess", str(self.output is Output.UINT8)))
        if self.output.is_image:
            query.append(("image_format", self.output.value))
        query += self.scaling.to_query()
        optional = {"height": self.height, "width": self.width, "fps": self.fps}
        query += [(name, str(value)) for name, value in optional.items() if value is not None]
        query += self.hints.to_query()
        media_type = self.output.media_type
        accept = f"tensor/{self.reply}" if media_type == TENSOR else media_type
        data = self.latents.data.data
        headers = {"content-type": f"tensor/{self.body}", "accept": accept} | deadline_headers(self.deadline_s)
        return query, headers, data if self.body == "binary" else to_base64(data)

    @classmethod
    def from_http(cls, query: Iterable[tuple[str, str]], headers: Mapping[str, str], body: Any) -> DecodeRequest:
        """The request that a client of any generation of the protocol sent: see `Message.read` for the arguments."""
        return cls.from_message(Message.read(query, headers, body))

    @classmethod
    def from_message(cls, message: Message) -> DecodeRequest:
        """Raises BadRequest or UnknownContentType, naming the parameter."""
        values = message.values
        if message.content_type.startswith("image/"):
            raise UnknownContentType(
                f"Content-Type is {message.content_type!r}: a picture cannot be decoded; POST it to /<model>/encode",
                parameter="content-type",
            )
        shape, dtype = SHAPE.of(values), DTYPE.of(values)
        if shape is None:
            raise BadRequest("shape is missing; send the shape of the latents, e.g. shape=1&shape=4&shape=64&shape=64",
                             parameter="shape")  # fmt: skip
        if dtype is None:
            raise BadRequest(f"dtype is missing; send one of {', '.join(LATENT_DTYPES)}", parameter="dtype")
        return cls(
            latents=RawTensor(message.flat, dtype, shape),
            scaling=Scaling.of(values, own_unless_said=message.is_v0),
            output=_output(values, message.accept),
            height=HEIGHT.of(values),
            width=WIDTH.of(values),
            fps=FPS.of(values),
            hints=Hints.of(values),
            body=message.transfer,
            reply=message.reply,
            deadline_s=message.deadline_s,
        )


def _output(values: Values, accept: Sequence[str]) -> Output:
    """`output_type` says what, Accept how it is written; `pil` with a tensor Accept is the pair in which Accept decides."""
    partial = PARTIAL_POSTPROCESS.of(values)
    subtype = next((media.removeprefix("image/") for media in accept if media in ("image/jpeg", "image/png")), "jpg")
    image_format = IMAGE_FORMAT.of(values) or subtype
    output_type = OUTPUT_TYPE.of(values) or "pil"
    if output_type == "mp4":
        return Output.MP4
    if output_type == "pt":
        return Output.UINT8 if partial else Output.PT
    if accept[0].startswith("tensor/"):
        return Output.UNIT
    return Output.PNG if image_format == "png" else Output.JPEG
