"""A client call from end to end: its requests are sent by a transport, their results are read, with a fallback where one
cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from remote_vae.errors import BrokenReply
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae.transports.transport import Transport
from remote_vae.transports.waiting import OnWait

T_co = TypeVar("T_co", covariant=True)
INLINE = 2**19
"""Bytes of a tensor that is cast, or read, on the event loop: in some ten microseconds, where a thread and back takes two tenths
of a millisecond."""


class Call(Protocol[T_co]):
    """A `DecodeCall` or an `EncodeCall`."""

    @property
    def host_bytes(self) -> float: ...

    def requests(self) -> Sequence[Request]: ...

    def answer(self, results: Sequence[Result]) -> T_co: ...


def ask(transport: Transport, call: Call[T_co], on_wait: OnWait | None = None) -> T_co:
    """What the call returns. Raises RemoteVAEError and nothing else."""
    requests = call.requests()
    results = transport.send(requests, on_wait)
    try:
        return call.answer(results)
    except BrokenReply as error:  # a picture is found to be corrupt only here, where it is opened
        return call.answer([transport.in_place_of(error, request) for request in requests])


async def ask_async(transport: Transport, call: Call[T_co], on_wait: OnWait | None = None) -> T_co:
    """The same without blocking the event loop."""
    requests = call.requests() if call.host_bytes <= INLINE else await asyncio.to_thread(call.requests)
    results = await transport.send_async(requests, on_wait)
    if all(result.shape is not None for result in results) and sum(result.data.nbytes for result in results) <= INLINE:
        with suppress(BrokenReply):  # the thread finds it too, and what takes its place may take seconds
            return call.answer(results)

    def read() -> T_co:
        try:
            return call.answer(results)
        except BrokenReply as error:
            return call.answer([transport.in_place_of(error, request) for request in requests])

    return await asyncio.to_thread(read)
