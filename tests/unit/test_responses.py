"""An answer's body on its way to the server below: in one, or in pieces; as views, or as copies that another process can have."""

from __future__ import annotations

import asyncio
import pickle
import time
from typing import Any

import numpy as np
import pytest
from starlette.responses import Response, StreamingResponse

from remote_vae_serve.http.responses import PAUSE_S, SLICE, STREAMED, reply

Sent = list[bytes | memoryview]


def messages_of(response: Response) -> list[Any]:
    """What the server below is given."""
    messages: list[Any] = []

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(response({"type": "http"}, receive, send))
    return messages


def sent(response: Response) -> Sent:
    """The bodies of its messages, those that are not empty."""
    bodies = [message.get("body") for message in messages_of(response) if message["type"] == "http.response.body"]
    assert all(isinstance(body, (bytes, memoryview)) for body in bodies)
    return [body for body in bodies if body]


def body_of(size: int) -> memoryview:
    return memoryview(np.random.default_rng(0).bytes(size))


@pytest.mark.parametrize("has_connection", [True, False])
@pytest.mark.parametrize("size", [1, STREAMED, STREAMED + 1, STREAMED + SLICE // 2])
def test_whatever_way_it_goes_it_is_the_body(size: int, has_connection: bool) -> None:
    body = body_of(size)
    response = reply({"a": "b"}, body, has_connection)
    assert b"".join(sent(response)) == body
    assert response.headers["content-length"] == str(size)
    assert response.headers["a"] == "b"
    assert isinstance(response, StreamingResponse) == (size > STREAMED)


def test_who_has_the_connection_copies_nothing() -> None:
    body = body_of(STREAMED + 1)
    pieces = sent(reply({}, body, True))
    assert all(np.shares_memory(np.frombuffer(piece, np.uint8), np.frombuffer(body, np.uint8)) for piece in pieces)


def test_for_another_process_each_piece_is_a_copy_and_has_a_moment_to_be_fetched() -> None:
    body = body_of(STREAMED + 1)
    began = time.perf_counter()
    pieces = sent(reply({}, body, False))
    assert {type(piece) for piece in pieces} == {bytes}
    assert max(map(len, pieces)) == SLICE
    assert time.perf_counter() - began >= len(pieces) * PAUSE_S


@pytest.mark.parametrize("size", [10, STREAMED + 1])
def test_what_goes_through_serves_proxy_all_the_same_is_pickled_as_bytes(size: int) -> None:
    body = body_of(size)
    messages = messages_of(reply({"a": "b"}, body, True))
    pickled = [pickle.loads(pickle.dumps(message)) for message in messages]
    assert {type(message) for message in pickled} == {dict}
    assert b"".join(message.get("body", b"") for message in pickled) == body
    assert {type(message["body"]) for message in pickled if message.get("body")} == {bytes}
    assert [message["type"] for message in pickled] == [message["type"] for message in messages]


def test_views_are_pickled_by_nobody_else_in_this_process() -> None:
    with pytest.raises(TypeError, match="memoryview"):
        pickle.dumps(memoryview(b"anybody's"))
