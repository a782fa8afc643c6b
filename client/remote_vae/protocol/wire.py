"""`Scaling`, `Provenance` and `Result`, which decode and encode share, and how a result is serialized for HTTP and for a Ray
handle. The requests are in `decode_request` and `encode_request`.

Pure: nothing here reads a socket or a file. HTTP is the Hugging Face Remote VAE protocol (query parameters, a raw body,
`shape` and `dtype` headers back); a Ray handle carries a tuple of plain values that starts with `PROTOCOL`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from remote_vae.errors import BadRequest, BrokenReply, ProtocolMismatch
from remote_vae.protocol import parameters
from remote_vae.protocol.messages import Query, Transfer
from remote_vae.protocol.parameters import Values
from remote_vae.protocol.tensors import RawTensor

PROTOCOL = 3
"""Version of the tuples that cross a Ray handle; both sides must have the same."""

SHAPE = parameters.integers("shape", "Sizes of the tensor's axes: repeated keys, a JSON list or a comma list.")
DO_SCALING = parameters.boolean(
    "do_scaling", "True applies the model's own convention where no factor is sent; False applies nothing at all."
)
SCALING_FACTOR = parameters.number(
    "scaling_factor",
    "Decoding computes z / scaling_factor + shift_factor, encoding (z - shift_factor) * scaling_factor.",
)
SHIFT_FACTOR = parameters.number("shift_factor", "See scaling_factor.")
SCALING = (DO_SCALING, SCALING_FACTOR, SHIFT_FACTOR)


@dataclass(frozen=True)
class Scaling:
    """Which convention the server applies to latents: the model's own, or `z / factor + shift` with what was sent, or none;
    to latents that it encoded, the inverse.

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

    @classmethod
    def of(cls, values: Values, own_unless_said: bool = False) -> Scaling:
        """`do_scaling=False` wins; then factors that were sent; then `do_scaling=True`; then nothing, or `own_unless_said`."""
        do_scaling = DO_SCALING.of(values)
        given = cls(False, SCALING_FACTOR.of(values), SHIFT_FACTOR.of(values))  # checked also where it is moot
        if do_scaling is False:
            return cls()
        own = do_scaling or own_unless_said
        return cls(own=True) if own and given == cls() else given

    def to_query(self) -> Query:
        if self.factor is None and self.shift is None:
            return [("do_scaling", str(self.own))]
        sent = (("scaling_factor", self.factor), ("shift_factor", self.shift))
        return [(name, str(value)) for name, value in sent if value is not None]


@dataclass(frozen=True)
class Provenance:
    """Which model answered, and how.

    Attributes:
        model: name of the application.
        revision: revision of the weights, or "" where they have none.
        dtype: dtype the decoder ran in.
        timings: (stage, milliseconds) in the order they happened.
        tiling: pixels along the edge of the tiles that it was decoded in; "" where it was decoded whole.
    """

    model: str = ""
    revision: str = ""
    dtype: str = ""
    timings: tuple[tuple[str, float], ...] = ()
    tiling: str = ""


@dataclass(frozen=True, eq=False)
class Result:
    """What a decode or an encode gave: a file (JPEG, PNG, mp4) or a tensor.

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
        """For a Ray handle: numpy view, strings, numbers, None; no class of ours, no torch tensor."""
        p = self.provenance
        about = (p.model, p.revision, p.dtype, p.timings, p.tiling)
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
        if self.provenance.tiling:
            headers["x-vae-tiling"] = self.provenance.tiling
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
    def from_http(cls, headers: Mapping[str, str], body: bytes | bytearray) -> Result:
        """The result in a 200.

        Args:
            headers: with lower-case names.

        Raises:
            BrokenReply: it is not an answer of this protocol.
        """
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        provenance = Provenance(
            headers.get("x-vae-model", ""), headers.get("x-vae-revision", ""), headers.get("x-vae-dtype", ""),
            _timings(headers.get("server-timing", "")), headers.get("x-vae-tiling", ""),
        )  # fmt: skip
        if media_type in ("image/jpeg", "image/png", "video/mp4"):
            return cls(media_type, np.frombuffer(body, np.uint8), provenance=provenance)
        data: bytes | bytearray = body
        try:
            if media_type == "tensor/base64":
                fields = json.loads(body)
                data = base64.b64decode(fields["inputs"], validate=True)
                shape, dtype = fields["parameters"]["shape"], fields["parameters"]["dtype"]
            else:
                shape, dtype = json.loads(headers["shape"]), headers["dtype"]
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
