"""`EncodeRequest`: a picture or pixels, and what of the latent distribution is asked for; how it is serialized for HTTP and for a
Ray handle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from remote_vae.errors import BadRequest
from remote_vae.protocol import parameters
from remote_vae.protocol import plain as read
from remote_vae.protocol.hints import ENCODE_PARAMETERS as HINTS
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.messages import Message, Query, Transfer, deadline_headers, to_base64
from remote_vae.protocol.parameters import Parameter
from remote_vae.protocol.tensors import ITEM_SIZE, RawTensor
from remote_vae.protocol.wire import PROTOCOL, SCALING, SHAPE, Scaling, check_protocol

Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""The bytes of a PNG, JPEG or WebP file."""


def in_rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB: alpha is dropped, 16-bit greys are scaled to 8 bits (`convert` alone would clip them)."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "P":  # by way of RGBA: `convert` alone warns where the palette has transparent colours
        picture = picture.convert("RGBA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy it


def in_rgba(picture: Image.Image) -> Image.Image:
    """The picture in RGBA, opaque where it has no alpha."""
    has_alpha = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    if picture.mode == "RGBA":
        return picture
    return picture.convert("RGBA") if has_alpha else in_rgb(picture).convert("RGBA")


class SampleMode(str, Enum):
    """What is taken of the encoder's distribution: a SAMPLE, as image-to-image pipelines do; its mode (ARGMAX); or its
    MOMENTS, mean and log-variance along the channels, `[B, 2C, h, w]`, to sample from elsewhere."""

    SAMPLE = "sample"
    ARGMAX = "argmax"
    MOMENTS = "moments"


DTYPE = parameters.text(
    "dtype", "dtype of the pixels: uint8 is 0 to 255, channels last; floats are -1 to 1.", ITEM_SIZE
)
SAMPLE_MODE = parameters.choice(
    "sample_mode",
    "sample (default), argmax (the mode of the distribution), or moments (mean and log-variance along the channels).",
    {mode.value: mode for mode in SampleMode},
)
SEED = parameters.integer(
    "seed",
    "Of the sample: that of torch.Generator('cpu').manual_seed(seed); random if unset.",
    minimum=0, maximum=2**63 - 1,
)  # fmt: skip
PARAMETERS: tuple[Parameter[Any], ...] = (SHAPE, DTYPE, *SCALING, SAMPLE_MODE, SEED, *HINTS)


@dataclass(frozen=True, eq=False)
class EncodeRequest:
    """One encode, checked as far as it can be without knowing the model.

    Attributes:
        image: the bytes of a file (PNG, JPEG, WebP); or pixels: floats in [-1, 1], `[B, 3, H, W]`, `[3, H, W]`, video
            `[B, 3, T, H, W]`; or uint8, `[N, H, W, 3]` or `[H, W, 3]`: N images, or the N frames of one video where the model
            is one for videos; with 4 channels where the model takes alpha.
        scaling: applied to the latents: the model's own, `(z - shift) * factor`, or none.
        seed: 0 to 2**63 - 1.
        hints: what the picture and the config do not tell; without a seed.
        body, reply: how tensors are written over HTTP; a handle does not care.
        deadline_s: seconds for which the client waits, from the moment of sending; None where it does not say.
        client: who asks, of those that share the model's queue; a server says it of what comes by HTTP, a transport by handle.

    Raises:
        BadRequest: naming the parameter.
    """

    image: RawTensor | Picture
    scaling: Scaling = field(default_factory=Scaling)
    sample_mode: SampleMode = SampleMode.SAMPLE
    seed: int | None = None
    hints: Hints = field(default_factory=Hints)
    body: Transfer = "binary"
    reply: Transfer = "binary"
    deadline_s: float | None = None
    client: str = ""

    verb: ClassVar[str] = "encode"

    def __post_init__(self) -> None:
        # A `seed` on the wire is read for both, and is the sample's.
        object.__setattr__(self, "hints", replace(self.hints, seed=None))
        if isinstance(self.image, RawTensor):
            shape = self.image.shape
            if self.image.dtype == "uint8" and not (len(shape) in (3, 4) and shape[-1] in (3, 4)):
                raise BadRequest(
                    f"uint8 pixels have shape {list(shape)}; expected [N, H, W, 3] or [H, W, 3], or 4 with alpha",
                    parameter="shape",
                )
            if self.image.dtype != "uint8" and len(shape) not in (3, 4, 5):
                raise BadRequest(
                    f"The pixels have shape {list(shape)}; expected [B, 3, H, W], [3, H, W] or a video [B, 3, T, H, W]",
                    parameter="shape",
                )
        elif not self.image.nbytes:
            raise BadRequest("The body is empty; send a PNG, JPEG or WebP, or pixels with shape and dtype",
                             parameter="image")  # fmt: skip
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise BadRequest(f"seed is {self.seed}; expected 0 to 2**63 - 1", parameter="seed")
        if self.sample_mode is SampleMode.MOMENTS and self.scaling != Scaling():
            raise BadRequest(
                "sample_mode=moments are not latents yet and cannot be scaled; send no factor and no do_scaling",
                parameter="sample_mode",
            )
        for name, transfer in (("input_tensor_type", self.body), ("output_tensor_type", self.reply)):
            if transfer not in ("binary", "base64"):
                raise BadRequest(f"{name} is {transfer!r}; expected binary or base64", parameter=name)

    def to_plain(self) -> tuple[Any, ...]:
        """For a Ray handle: numpy view, strings, numbers, None; no class of ours, no torch tensor."""
        image = self.image
        pixels = (image.data, image.dtype, image.shape) if isinstance(image, RawTensor) else (image, None, None)
        scaling, hints = self.scaling.to_plain(), self.hints.to_wire()
        return (PROTOCOL, *pixels, scaling, self.sample_mode.value, self.seed, hints, self.deadline_s, self.client)

    @classmethod
    def from_plain(cls, plain: tuple[Any, ...]) -> EncodeRequest:
        """From what `to_plain` gives. Raises BadRequest naming what is wrong, or ProtocolMismatch."""
        check_protocol(plain, "client")
        _, data, dtype, shape, scaling, sample_mode, seed, hints, deadline_s, client = read.fields(plain, 10, "request")
        file = read.array(data, "image")
        is_file = dtype is None
        return cls(
            file if is_file else RawTensor(file, read.text(dtype, "dtype"), read.sizes(shape, "shape")),
            scaling=Scaling.from_plain(scaling),
            sample_mode=read.member(SampleMode)(sample_mode, "sample_mode"),
            seed=read.optional(read.integer, seed, "seed"),
            hints=Hints.from_plain(hints),
            deadline_s=read.optional(read.number, deadline_s, "deadline_s"),
            client=read.text(client, "client"),
        )

    def to_http(self) -> tuple[Query, dict[str, str], bytes | memoryview]:
        """Query, headers and body of the POST to `/<model>/encode`."""
        query: Query = self.scaling.to_query()
        content_type, data = "application/octet-stream", self.image
        if isinstance(data, RawTensor):
            query += [("shape", str(size)) for size in data.shape]
            query.append(("dtype", data.dtype))
            content_type, data = f"tensor/{self.body}", data.data
        query.append(("sample_mode", self.sample_mode.value))
        if self.seed is not None:
            query.append(("seed", str(self.seed)))
        query += self.hints.to_query()
        as_base64 = content_type == "tensor/base64"
        headers = {"content-type": content_type, "accept": f"tensor/{self.reply}"} | deadline_headers(self.deadline_s)
        return query, headers, to_base64(data.data) if as_base64 else data.data

    @classmethod
    def from_http(cls, query: Iterable[tuple[str, str]], headers: Mapping[str, str], body: Any) -> EncodeRequest:
        """The request that a client sent: see `Message.read` for the arguments."""
        return cls.from_message(Message.read(query, headers, body))

    @classmethod
    def from_message(cls, message: Message) -> EncodeRequest:
        """Raises BadRequest naming the parameter."""
        values = message.values
        return cls(
            image=_image(message),
            scaling=Scaling.of(values),
            sample_mode=SAMPLE_MODE.of(values) or SampleMode.SAMPLE,
            seed=SEED.of(values),
            hints=Hints.of(values),
            body=message.transfer,
            reply=message.reply,
            deadline_s=message.deadline_s,
        )


def _image(message: Message) -> RawTensor | Picture:
    """Pixels where a shape was sent or the Content-Type says so, else the file of a picture."""
    data = message.flat
    shape, dtype = SHAPE.of(message.values), DTYPE.of(message.values)
    if shape is None and not message.content_type.startswith("tensor/"):
        return data
    if shape is None:
        raise BadRequest("shape is missing; send the shape of the pixels, e.g. shape=1&shape=3&shape=512&shape=512",
                         parameter="shape")  # fmt: skip
    if dtype is None:
        raise BadRequest(f"dtype is missing; send one of {', '.join(ITEM_SIZE)}", parameter="dtype")
    return RawTensor(data, dtype, shape)
