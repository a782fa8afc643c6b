"""An answer's body on its way to the server below: in one, or in pieces; as views, or as copies that another process can have."""

from __future__ import annotations

import asyncio
import pickle
import time

import numpy as np
import pytest
from starlette.responses import Response, StreamingResponse

from remote_vae_serve.http.responses import PAUSE_S, SLICE, STREAMED, reply

Sent = list[bytes | memoryview]


def sent(response: Response) -> Sent:
    """What the server below is given, message by message."""
    bodies: Sent = []

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            body = message["body"]
            assert isinstance(body, (bytes, memoryview))
            bodies.append(body)

    asyncio.run(response({"type": "http"}, receive, send))  # type: ignore[arg-type]
    return bodies


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


def test_a_view_that_goes_through_serves_proxy_all_the_same_is_pickled_as_its_bytes() -> None:
    body = body_of(10)
    assert pickle.loads(pickle.dumps(body)) == bytes(body)
