"""`Result` and `Provenance`: the reply of a decode or an encode: its HTTP headers and body, and the tuple that crosses a Ray
handle.

A header of replies begins here, as a field of `Provenance`, which `Pipeline` and the local fallback fill in. It is carried by
position over handles, so that `PROTOCOL` goes up with it, and described in `HEADERS`, which OpenAPI reads too.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from remote_vae.errors import BrokenReply
from remote_vae.protocol.messages import Transfer
from remote_vae.protocol.output import FILE_TYPES, TENSOR
from remote_vae.protocol.tensors import RawTensor
from remote_vae.protocol.wire import PROTOCOL, check_protocol

HEADERS = {
    "x-vae-model": "Who answered.",
    "x-vae-revision": "Of its weights.",
    "x-vae-dtype": "What it ran in.",
    "x-vae-tiling": "Pixels along the edge of the tiles that it was decoded in; absent where it was decoded whole.",
    "server-timing": "Milliseconds of each stage: queue, decode, encode.",
    "shape": "Of a tensor/binary reply: a JSON list.",
    "dtype": "Of a tensor/binary reply.",
}
"""The headers that `Result.to_http` writes, and what they mean."""


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
        if media_type in FILE_TYPES:
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
        return cls(TENSOR, raw.data, raw.dtype, raw.shape, provenance)


def _timings(header: str) -> tuple[tuple[str, float], ...]:
    timings = []
    for part in filter(None, header.split(",")):
        stage, _, duration = part.strip().partition(";dur=")
        try:
            timings.append((stage, float(duration)))
        except ValueError:
            continue
    return tuple(timings)
