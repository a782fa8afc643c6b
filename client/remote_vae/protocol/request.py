"""Which request a POST is: `read_request` is where every parser of the protocol begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from remote_vae.errors import BadRequest
from remote_vae.protocol import plain as read
from remote_vae.protocol.decode_request import OUTPUT_TYPE, DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.messages import Message, Query, transfer_of
from remote_vae.protocol.tensors import MAX_SIZE, RawTensor, announced
from remote_vae.protocol.wire import SHAPE, check_protocol

Request = DecodeRequest | EncodeRequest
Verb = Literal["decode", "encode"]
LARGE = 2**20
"""Bytes of a body from which on it is worth asking a replica, before the body is read, whether it will be answered."""


def read_request(verb: Verb | None, query: Iterable[tuple[str, str]], headers: Mapping[str, str], body: Any) -> Request:
    """The request that a client of any generation sent; see `Message.read` for the arguments.

    Args:
        verb: what the path says; None for `POST /<model>`, the one URL of Hugging Face's clients for both.
    """
    message = Message.read(query, headers, body)
    if verb == "encode" or (verb is None and _is_encode(message)):
        return EncodeRequest.from_message(message)
    return DecodeRequest.from_message(message)


def read_announced(verb: Verb | None, query: Query, headers: Mapping[str, str], nbytes: int) -> Request | None:
    """The request whose body has not come yet; None where that is not large, or the query does not tell of it.

    Its tensor has a dtype and a shape and no bytes.

    Args:
        verb, query, headers: as for `read_request`, which raises the same.
        nbytes: what the body will have; 0 where that is not known.
    """
    if nbytes <= LARGE or transfer_of(headers) != "binary" or not any(name == SHAPE.name for name, _ in query):
        return None
    return read_request(verb, query, headers, announced(nbytes))


def announced_to_plain(request: Request) -> tuple[Any, ...]:
    """For a Ray handle, as `to_plain`; in place of the bytes that have not come, how many they are."""
    protocol, data, *fields = request.to_plain()
    return (protocol, data.nbytes, *fields)


def announced_from_plain(verb: Any, plain: tuple[Any, ...]) -> Request:
    """From what `announced_to_plain` gives. Raises BadRequest naming what is wrong, or ProtocolMismatch."""
    check_protocol(plain, "client")
    if len(plain) < 2 or verb not in ("decode", "encode"):
        raise BadRequest("An announcement is a verb, decode or encode, and the request's tuple", parameter="request")
    protocol, nbytes, *fields = plain
    data = announced(min(max(0, read.integer(nbytes, "data")), MAX_SIZE))
    request = (EncodeRequest if verb == "encode" else DecodeRequest).from_plain((protocol, data, *fields))
    if isinstance(request, EncodeRequest) and not isinstance(request.image, RawTensor):
        raise BadRequest("Of the file of a picture nothing is known before it comes", parameter="image")
    return request


def _is_encode(message: Message) -> bool:
    """Nothing says that a tensor is to be decoded, and what was sent is a picture, or a tensor of three channels."""
    if message.content_type.startswith("tensor/") or message.is_v0 or OUTPUT_TYPE.name in message.values:
        return False
    if message.content_type.startswith("image/"):
        return True
    shape = SHAPE.of(message.values)
    if shape is None:
        return message.holds_picture
    return len(shape) in (3, 4, 5) and shape[0 if len(shape) == 3 else 1] == 3
