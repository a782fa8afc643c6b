"""Tuples that cross a Ray handle: whoever holds a handle may send anything, and is told by name what is wrong with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from remote_vae.errors import BadRequest, ProtocolMismatch, RemoteVAEError
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.request import Request
from remote_vae.protocol.tensors import from_array

REQUESTS: dict[str, Request] = {
    "decode": DecodeRequest(from_array(np.zeros((1, 4, 2, 2), np.float32)), deadline_s=3.0),
    "encode": EncodeRequest(from_array(np.zeros((1, 3, 8, 8), np.float32)), deadline_s=3.0),
    "picture": EncodeRequest(np.zeros(64, np.uint8), deadline_s=3.0),
}
STRANGE = {
    "an array": np.zeros(3), "bytes": b"x", "a string": "x", "an object": object(), "a list": [1], "a mapping": {1: 2},
    "nan": float("nan"), "a flag": True, "numbers": (1, 2, 3), "an array of objects": np.array([None]), "none": None,
    "a set": {1}, "a large number": 10**400, "a tuple that is empty": (), "a number of numpy's": np.float64("inf"),
}  # fmt: skip
PLACES = [(name, place) for name, request in REQUESTS.items() for place in range(len(request.to_plain()))]


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize(("name", "place"), PLACES)
def test_whatever_stands_in_a_place_is_taken_or_refused_by_name(name: str, place: int, strange: Any) -> None:
    plain = list(REQUESTS[name].to_plain())
    plain[place] = strange
    read, refused = None, None
    try:
        read = type(REQUESTS[name]).from_plain(tuple(plain))
    except RemoteVAEError as error:
        refused = error
    if read is None:
        assert refused is not None
        assert isinstance(refused, ProtocolMismatch) == (place == 0)
        assert place == 0 or refused.parameter
        assert len(refused.message) < 600
        return
    # What later code compares or computes with is what it takes it for.
    assert read.deadline_s is None or isinstance(read.deadline_s, float)
    assert all(type(size) is int for size in read.to_plain()[3] or ())


@pytest.mark.parametrize("name", REQUESTS)
def test_a_tuple_of_another_length_or_kind_is_refused(name: str) -> None:
    kind, plain = type(REQUESTS[name]), REQUESTS[name].to_plain()
    for wrong in (plain[:-1], (*plain, 1), plain[:1]):
        with pytest.raises(BadRequest, match="a tuple of"):
            kind.from_plain(wrong)
    for strange in STRANGE.values():
        with pytest.raises(ProtocolMismatch):
            kind.from_plain(strange)


@pytest.mark.parametrize("name", REQUESTS)
def test_what_was_sent_is_what_is_read(name: str) -> None:
    plain = REQUESTS[name].to_plain()
    again = type(REQUESTS[name]).from_plain(plain).to_plain()
    assert [value for value in again if not isinstance(value, np.ndarray)] == [
        value for value in plain if not isinstance(value, np.ndarray)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(plain, again, strict=True) if isinstance(a, np.ndarray))


def test_no_value_of_the_latents_is_in_a_message() -> None:
    plain = list(REQUESTS["decode"].to_plain())
    plain[1] = np.full(16, 0.123456, np.float32)
    with pytest.raises(BadRequest, match="ndarray") as caught:
        DecodeRequest.from_plain(tuple(plain))
    assert "0.12" not in caught.value.message
