"""`Message`: the body, query and headers of a POST, the same for every version of the protocol.

v0 sent JSON with everything in it. v1 sent a query, and base64 in JSON or raw bytes. Today's clients send a query and raw
bytes; to encode, those of a picture, with no Content-Type at all.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from remote_vae.errors import BadRequest, UnknownContentType
from remote_vae.protocol.parameters import Values, collect

Transfer = Literal["binary", "base64"]
Query = list[tuple[str, str]]
DEADLINE_HEADER = "x-vae-deadline-ms"

_MAGIC = {"png": (b"\x89PNG\r\n\x1a\n", 0), "jpeg": (b"\xff\xd8\xff", 0), "webp": (b"WEBP", 8)}
PICTURE_TYPES = tuple(f"image/{name}" for name in _MAGIC)
"""Media types of the pictures that an encode takes."""
_TRANSFERS: dict[str, Transfer] = {
    "tensor/binary": "binary", "tensor/base64": "base64", "application/json": "base64",
    "application/octet-stream": "binary", "": "binary", **dict.fromkeys(PICTURE_TYPES, "binary"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Message:
    """What was sent.

    Attributes:
        values: the parameters, out of the query and, for v0, out of the body.
        data: the bytes of a tensor or of a picture.
        content_type: without parameters, in lower case; "" where none was sent.
        transfer: how the body held `data`.
        accept: the media types that the client takes, in its order.
        deadline_s: seconds for which it waits; None where it does not say.
    """

    values: Values
    data: Any
    content_type: str
    transfer: Transfer
    accept: tuple[str, ...]
    deadline_s: float | None

    @classmethod
    def read(cls, query: Iterable[tuple[str, str]], headers: Mapping[str, str], body: Any) -> Message:
        """From a request.

        Args:
            query: decoded pairs.
            headers: with lower-case names.
            body: bytes, or a buffer of them.

        Raises:
            UnknownContentType, BadRequest: naming what is wrong.
        """
        content_type = _media_type(headers.get("content-type", ""))
        if content_type not in _TRANSFERS:
            known = ", ".join(filter(None, _TRANSFERS))
            raise UnknownContentType(f"Content-Type is {content_type!r}; expected one of {known}",
                                     parameter="content-type")  # fmt: skip
        values = collect(query)
        transfer, data = _TRANSFERS[content_type], body
        if transfer == "base64":
            data, of_body = _from_json(bytes(body))
            if content_type == "application/json":
                values = {**of_body, **values}
        accept = tuple(_media_type(media) for media in headers.get("accept", "").split(","))
        return cls(values, data, content_type, transfer, accept, deadline_of(headers))

    @property
    def flat(self) -> npt.NDArray[np.uint8]:
        """`data` as a flat array; see `tensors.announced` for those that have not come."""
        return self.data if isinstance(self.data, np.ndarray) else np.frombuffer(self.data, np.uint8)

    @property
    def reply(self) -> Transfer:
        return "base64" if "tensor/base64" in self.accept else "binary"

    @property
    def is_v0(self) -> bool:
        """Whether its sender leaves everything to the server: the latents come as the pipeline left them."""
        return self.content_type == "application/json"

    @property
    def holds_picture(self) -> bool:
        """Whether the bytes begin as those of a PNG, a JPEG or a WebP do."""
        head = bytes(self.data[:16])
        return any(head[at : at + len(magic)] == magic for magic, at in _MAGIC.values())


def transfer_of(headers: Mapping[str, str]) -> Transfer | None:
    """How the body holds its bytes, by its Content-Type; None for one that is not known."""
    return _TRANSFERS.get(_media_type(headers.get("content-type", "")))


def deadline_of(headers: Mapping[str, str]) -> float | None:
    """Seconds for which the client says it will wait. Raises BadRequest."""
    sent = headers.get(DEADLINE_HEADER)
    if sent is None:
        return None
    if not sent.isascii() or not sent.isdecimal() or not 0 < len(sent) < 12 or int(sent) == 0:
        raise BadRequest(f"{DEADLINE_HEADER} is {sent[:80]!r}; expected whole milliseconds, at least 1",
                         parameter=DEADLINE_HEADER)  # fmt: skip
    return int(sent) / 1000


def deadline_headers(deadline_s: float | None) -> dict[str, str]:
    """What `deadline_of` reads."""
    return {} if deadline_s is None else {DEADLINE_HEADER: str(max(1, min(int(deadline_s * 1000), 10**10)))}


def to_base64(data: Any) -> bytes:
    """The body that holds `data` in the base64 way."""
    return json.dumps({"inputs": base64.b64encode(data).decode()}).encode()


def _media_type(header: str) -> str:
    return header.partition(";")[0].strip().lower()


def _from_json(body: bytes) -> tuple[bytes, dict[str, list[str]]]:
    """`inputs` and, by name, the values of `parameters`."""
    try:
        fields = json.loads(body)
        data = base64.b64decode(fields["inputs"], validate=True)
        parameters = fields.get("parameters") or {}
        values = {str(name): _written(value) for name, value in parameters.items() if value is not None}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error):
        raise BadRequest(
            'The body is not JSON of the form {"inputs": "<base64 of the bytes>", "parameters": {...}}',
            parameter="inputs",
        ) from None
    return data, values


def _written(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
