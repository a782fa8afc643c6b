"""Bytes to nouns and back: what a decode request and its result are, and how they are written on either door.

Pure: nothing here reads a socket or a file. HTTP is the Hugging Face Remote VAE protocol (query parameters, a raw body,
`shape` and `dtype` headers back); a Ray handle carries a tuple of plain values that starts with `PROTOCOL`.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np

from remote_vae.errors import BadRequest, BrokenReply, ProtocolMismatch, UnknownContentType
from remote_vae.parameters import Parameters
from remote_vae.tensors import LATENT_DTYPES, RawTensor

PROTOCOL = 1
"""Version of the tuples that cross a Ray handle; both sides must have the same."""

Transfer = Literal["binary", "base64"]
Query = list[tuple[str, str]]


class Output(str, Enum):
    """What a reply carries. HTTP says it with three parameters and a header; see `_output`.

    JPEG and PNG hold one 8-bit RGB image. UNIT is `output_type=pil` as a float tensor in [0, 1]: `[B, C, H, W]`, or
    `[T, C, H, W]` for one video. PT is what the decoder put out, not clamped, `[B, C, H, W]` or `[B, C, T, H, W]`, in the
    model's dtype. UINT8 is `[B, H, W, C]` or `[T, H, W, C]`. MP4 is one video file.
    """

    JPEG = "jpg"
    PNG = "png"
    UNIT = "unit"
    PT = "pt"
    UINT8 = "uint8"
    MP4 = "mp4"

    @property
    def is_image(self) -> bool:
        return self in (Output.JPEG, Output.PNG)

    @property
    def media_type(self) -> str:
        media_types = {Output.JPEG: "image/jpeg", Output.PNG: "image/png", Output.MP4: "video/mp4"}
        return media_types.get(self, "tensor/binary")


@dataclass(frozen=True)
class Scaling:
    """Which denormalisation the server applies: the model's own, or `z / factor + shift` with what was sent, or none.

    Raises:
        BadRequest: a factor that is zero or not finite.
    """

    own: bool = False
    factor: float | None = None
    shift: float | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and (not math.isfinite(self.factor) or self.factor == 0):
            raise BadRequest(
                f"scaling_factor is {self.factor}; expected a finite number other than 0", parameter="scaling_factor"
            )
        if self.shift is not None and not math.isfinite(self.shift):
            raise BadRequest(f"shift_factor is {self.shift}; expected a finite number", parameter="shift_factor")


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """One decode, checked as far as it can be without knowing the model.

    Attributes:
        latents: float16, float32 or bfloat16.
        height, width: pixels; for packed latents only.
        fps: frames a second of an mp4; None for the family's own.
        body, reply: how tensors are written over HTTP; a handle does not care.

    Raises:
        BadRequest: naming the parameter.
    """

    latents: RawTensor
    scaling: Scaling = field(default_factory=Scaling)
    output: Output = Output.JPEG
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    body: Transfer = "binary"
    reply: Transfer = "binary"

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

    def to_plain(self) -> tuple[Any, ...]:
        """For a Ray handle: numpy view, strings, numbers, None; no class of ours, no torch tensor."""
        return (
            PROTOCOL, self.latents.data, self.latents.dtype, self.latents.shape,
            (self.scaling.own, self.scaling.factor, self.scaling.shift),
            self.output.value, self.height, self.width, self.fps,
        )  # fmt: skip

    @classmethod
    def from_plain(cls, plain: tuple[Any, ...]) -> DecodeRequest:
        check_protocol(plain, "client")
        _, data, dtype, shape, scaling, output, height, width, fps = plain
        return cls(RawTensor(data, dtype, tuple(shape)), Scaling(*scaling), Output(output), height, width, fps)

    def to_http(self) -> tuple[Query, dict[str, str], bytes | memoryview]:
        """Query, headers and body of the POST."""
        query: Query = [("shape", str(size)) for size in self.latents.shape]
        query.append(("dtype", self.latents.dtype))
        query.append(("output_type", {Output.MP4: "mp4", Output.PT: "pt", Output.UINT8: "pt"}.get(self.output, "pil")))
        query.append(("partial_postprocess", str(self.output is Output.UINT8)))
        if self.output.is_image:
            query.append(("image_format", self.output.value))
        if self.scaling.factor is None and self.scaling.shift is None:
            query.append(("do_scaling", str(self.scaling.own)))
        optional = {
            "scaling_factor": self.scaling.factor, "shift_factor": self.scaling.shift,
            "height": self.height, "width": self.width, "fps": self.fps,
        }  # fmt: skip
        query += [(name, str(value)) for name, value in optional.items() if value is not None]
        media_type = self.output.media_type
        accept = f"tensor/{self.reply}" if media_type == "tensor/binary" else media_type
        data = self.latents.data.data
        body = data if self.body == "binary" else json.dumps({"inputs": base64.b64encode(data).decode()}).encode()
        return query, {"content-type": f"tensor/{self.body}", "accept": accept}, body

    @classmethod
    def from_http(cls, query: Iterable[tuple[str, str]], headers: Mapping[str, str], body: Any) -> DecodeRequest:
        """The request that a client of any generation of the protocol sent.

        Args:
            query: decoded pairs; repeated keys, a JSON list and a comma list are all lists; unknown keys are ignored.
            headers: with lower-case names.
            body: bytes, or a buffer of them.
        """
        parameters = Parameters(query)
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in _CONTENT_TYPES:
            raise UnknownContentType(
                f"Content-Type is {content_type!r}; expected tensor/binary or tensor/base64", parameter="content-type"
            )
        transfer = _CONTENT_TYPES[content_type]
        shape, dtype = parameters.integers("shape"), parameters.text("dtype")
        if shape is None:
            raise BadRequest("shape is missing; send the shape of the latents, e.g. shape=1&shape=4&shape=64&shape=64",
                             parameter="shape")  # fmt: skip
        if dtype is None:
            raise BadRequest(f"dtype is missing; send one of {', '.join(LATENT_DTYPES)}", parameter="dtype")
        data = body if transfer == "binary" else _from_base64(bytes(body))
        accept = [media.partition(";")[0].strip().lower() for media in headers.get("accept", "").split(",")]
        return cls(
            latents=RawTensor(np.frombuffer(data, np.uint8), dtype, shape),
            scaling=_scaling(parameters),
            output=_output(parameters, accept),
            height=parameters.integer("height"),
            width=parameters.integer("width"),
            fps=parameters.number("fps"),
            body=transfer,
            reply="base64" if "tensor/base64" in accept else "binary",
        )


_CONTENT_TYPES: dict[str, Transfer] = {
    "tensor/binary": "binary", "tensor/base64": "base64",
    "": "binary", "application/octet-stream": "binary",
}  # fmt: skip


def _scaling(parameters: Parameters) -> Scaling:
    """`do_scaling=False` wins; then factors that were sent; then `do_scaling=True`; nothing sent, nothing applied."""
    do_scaling = parameters.boolean("do_scaling")
    factor, shift = parameters.number("scaling_factor"), parameters.number("shift_factor")
    given = Scaling(False, factor, shift)  # checked also where do_scaling=False makes it moot
    if do_scaling is False:
        return Scaling()
    return Scaling(own=True) if do_scaling and given == Scaling() else given


def _output(parameters: Parameters, accept: list[str]) -> Output:
    """`output_type` says what, Accept how it is written; `pil` with a tensor Accept is the pair in which Accept decides."""
    partial = parameters.boolean("partial_postprocess")
    subtype = next((media.removeprefix("image/") for media in accept if media in ("image/jpeg", "image/png")), "jpg")
    image_format = parameters.choice("image_format", subtype, {"jpg": "jpg", "jpeg": "jpg", "png": "png"})
    output_type = parameters.choice("output_type", "pil", {"pil": "pil", "pt": "pt", "mp4": "mp4"})
    if output_type == "mp4":
        return Output.MP4
    if output_type == "pt":
        return Output.UINT8 if partial else Output.PT
    if accept[0].startswith("tensor/"):
        return Output.UNIT
    return Output.PNG if image_format == "png" else Output.JPEG


def _from_base64(body: bytes) -> bytes:
    try:
        return base64.b64decode(json.loads(body)["inputs"], validate=True)
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
        raise BadRequest(
            'The body is not JSON of the form {"inputs": "<base64 of the latents>"}', parameter="inputs"
        ) from None


@dataclass(frozen=True)
class Provenance:
    """Which model answered, and how.

    Attributes:
        model: name of the application.
        revision: revision of the weights, or "" where they have none.
        dtype: dtype the decoder ran in.
        timings: (stage, milliseconds) in the order they happened.
    """

    model: str = ""
    revision: str = ""
    dtype: str = ""
    timings: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Result:
    """What a decode gave: a file (JPEG, PNG, mp4) or a tensor.

    Attributes:
        media_type: `image/jpeg`, `image/png`, `video/mp4` or `tensor/binary`.
        data: flat uint8 array; read-only where it is a view of another process's memory.
        dtype, shape: of a tensor; None for a file.
    """

    media_type: str
    data: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def tensor(self) -> RawTensor:
        if self.dtype is None or self.shape is None:
            raise BrokenReply(f"The reply is {self.media_type}, not a tensor")
        return RawTensor(self.data, self.dtype, self.shape)

    def to_plain(self) -> tuple[Any, ...]:
        """For a Ray handle; see `DecodeRequest.to_plain`."""
        p = self.provenance
        about = (p.model, p.revision, p.dtype, p.timings)
        return (PROTOCOL, self.media_type, self.data, self.dtype, self.shape, about)

    @classmethod
    def from_plain(cls, plain: tuple[Any, ...]) -> Result:
        check_protocol(plain, "server")
        _, media_type, data, dtype, shape, about = plain
        return cls(media_type, data, dtype, None if shape is None else tuple(shape), Provenance(*about))

    def to_http(self, reply: Transfer = "binary") -> tuple[dict[str, str], bytes | memoryview]:
        """Headers and body of the 200."""
        headers = {
            "content-type": self.media_type,
            "x-vae-model": self.provenance.model,
            "x-vae-revision": self.provenance.revision,
            "x-vae-dtype": self.provenance.dtype,
            "server-timing": ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in self.provenance.timings),
        }
        body: bytes | memoryview = self.data.data
        if self.shape is not None:
            shape, dtype = list(self.shape), str(self.dtype)
            headers |= {"shape": json.dumps(shape), "dtype": dtype}
            if reply == "base64":
                headers["content-type"] = "tensor/base64"
                fields = {"inputs": base64.b64encode(body).decode(), "parameters": {"shape": shape, "dtype": dtype}}
                body = json.dumps(fields).encode()
        return headers, body

    @classmethod
    def from_http(cls, headers: Mapping[str, str], body: bytes) -> Result:
        """The result in a 200.

        Args:
            headers: with lower-case names.

        Raises:
            BrokenReply: it is not an answer of this protocol.
        """
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        provenance = Provenance(
            headers.get("x-vae-model", ""), headers.get("x-vae-revision", ""), headers.get("x-vae-dtype", ""),
            _timings(headers.get("server-timing", "")),
        )  # fmt: skip
        if media_type in ("image/jpeg", "image/png", "video/mp4"):
            return cls(media_type, np.frombuffer(body, np.uint8), provenance=provenance)
        try:
            if media_type == "tensor/base64":
                fields = json.loads(body)
                data = base64.b64decode(fields["inputs"], validate=True)
                shape, dtype = fields["parameters"]["shape"], fields["parameters"]["dtype"]
            else:
                data, shape, dtype = body, json.loads(headers["shape"]), headers["dtype"]
            raw = RawTensor(np.frombuffer(data, np.uint8), str(dtype), tuple(int(size) for size in shape))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise BrokenReply(
                f"The reply ({media_type or 'no Content-Type'}) is not one of this protocol: {error}"
            ) from None
        return cls("tensor/binary", raw.data, raw.dtype, raw.shape, provenance)


def _timings(header: str) -> tuple[tuple[str, float], ...]:
    timings = []
    for part in filter(None, header.split(",")):
        stage, _, duration = part.strip().partition(";dur=")
        try:
            timings.append((stage, float(duration)))
        except ValueError:
            continue
    return tuple(timings)


def check_protocol(plain: Any, peer: str) -> None:
    """Refuse a tuple of another protocol version, whose fields would be misread, with both numbers named."""
    theirs = plain[0] if isinstance(plain, tuple) and plain else None
    if theirs != PROTOCOL:
        raise ProtocolMismatch(
            f"This side speaks handle protocol {PROTOCOL}, the {peer} sent {theirs!r}; "
            "install the same version of remote-vae on both"
        )
