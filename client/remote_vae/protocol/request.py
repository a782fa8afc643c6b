"""Which request a POST is: `read_request` is where every parser of the protocol begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from remote_vae.protocol.decode_request import OUTPUT_TYPE, DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.messages import Message
from remote_vae.protocol.wire import SHAPE

Request = DecodeRequest | EncodeRequest
Verb = Literal["decode", "encode"]


def read_request(verb: Verb | None, query: Iterable[tuple[str, str]], headers: Mapping[str, str], body: Any) -> Request:
    """The request that a client of any generation sent; see `Message.read` for the arguments.

    Args:
        verb: what the path says; None for `POST /<model>`, the one URL of Hugging Face's clients for both.
    """
    message = Message.read(query, headers, body)
    if verb == "encode" or (verb is None and _is_encode(message)):
        return EncodeRequest.from_message(message)
    return DecodeRequest.from_message(message)


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
