"""ASGI responses of results: the body at once, or where it is large streamed in pieces, so that it is never there twice and a
reader that stalls stalls us."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

BY_PROXY = "remote_vae.by_proxy"
"""Key of the ASGI scope of a request that has come, or may have, by Serve's proxy to a process that else has its connections."""
STREAMED = 8 * 2**20
SLICE = 2**20
PAUSE_S = 0.001
"""Between pieces that Serve's proxy fetches. It takes what has piled up and pickles that as one; given a moment, it takes each as
it comes: 400 MiB were there 2.2 times in all processes instead of 8.6 times, and through in half the time."""


def reply(headers: dict[str, str], body: memoryview, has_connection: bool) -> Response:
    """A response 200 with that body.

    Args:
        has_connection: whether this process has the client's connection, and pieces need not be copied for another.
    """
    if len(body) <= STREAMED:
        return _Whole(body, headers=headers) if has_connection else Response(bytes(body), headers=headers)
    pieces = _pieces(body, has_connection)
    return _Streamed(pieces, headers={**headers, "content-length": str(len(body))})


# An iterator that is not async would be run in a thread, piece by piece.
async def _pieces(body: memoryview, has_connection: bool) -> AsyncIterator[bytes | memoryview]:
    for start in range(0, len(body), SLICE):
        piece = body[start : start + SLICE]
        yield piece if has_connection else bytes(piece)
        # Without any pause uvicorn takes what nobody reads any more: nobody could say so.
        await asyncio.sleep(0 if has_connection else PAUSE_S)


class _Picklable(dict[str, Any]):
    """An ASGI message whose body may be a view, and is bytes where it is pickled, which a view by itself cannot be.

    While a model has no replica, a request meant for one goes through Serve's proxy all the same: what is sent then is no longer
    written to a connection of this process, but pickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({key: bytes(value) if isinstance(value, memoryview) else value for key, value in self.items()},)


def _picklable(send: Send) -> Send:
    async def send_picklable(message: Message) -> None:
        await send(_Picklable(message))

    return send_picklable


class _Whole(Response):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, _picklable(send))


class _Streamed(StreamingResponse):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, _picklable(send))
