"""Request bodies: read no further than the limit, no slower than a least rate, and all of them together within a budget of bytes,
so that no number of clients fills the memory of this process, and no client keeps the others out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.requests import ClientDisconnect, Request

from remote_vae.errors import BodyTooLarge, DeadlineExceeded, Overloaded
from remote_vae_serve.http.freed_memory import FreedMemory

WINDOW_S = 10.0
"""How often it is looked whether a body keeps the least rate. What came before counts no more: who sends much at once, and then
holds back the rest, waits no longer than others."""
LEAST_RATE = 2**16
"""Bytes a second: half a megabit. Who sends more slowly than that holds memory that others wait for."""
FULL_RETRY_S = 2.0


class Bodies:
    """The bodies that this process holds: those that are being read, and those of requests that wait for their answer.

    Args:
        most_each: largest body in bytes.
        most_together: bytes of all that are held at once; at least one largest body.
    """

    def __init__(self, most_each: int, most_together: int) -> None:
        self._most_each = most_each
        self._most_together = max(most_each, most_together)
        self._held: Counter[str] = Counter()
        self._freed = FreedMemory()

    @asynccontextmanager
    async def read(self, request: Request, client: str = "") -> AsyncIterator[bytearray]:
        """The whole body of a request; its room is free again when the block ends.

        Args:
            client: whose it is, see `client_identity`: beside another body a client may take what is free after it.

        Raises:
            BodyTooLarge: it is, or says that it will be; before any of it is read where it says so.
            Overloaded: there is no room for it beside the others now.
            DeadlineExceeded: it comes too slowly.
            ClientDisconnect: it does not come.
        """
        announced = self.announced(request)
        room = _Room(self, client, announced)
        try:
            yield await self._read(request, room)
        finally:
            room.give_back()

    async def _read(self, request: Request, room: _Room) -> bytearray:
        body = bytearray()
        with _pace(body) as pace:
            while True:
                try:
                    message = await request.receive()
                except asyncio.CancelledError:
                    if pace.kept:
                        raise
                    pace.forget()
                    raise DeadlineExceeded(
                        f"The body came more slowly than {LEAST_RATE // 1024} KiB a second", parameter="body"
                    ) from None
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                if len(body) > self._most_each:
                    raise self._too_large()
                room.grow_to(len(body))
                if not message.get("more_body", False):
                    return body

    def announced(self, request: Request) -> int:
        """Bytes that the body will have, 0 where it does not say. Raises BodyTooLarge."""
        written = request.headers.get("content-length", "")
        if not written.isdecimal():
            return 0
        # More digits than any body has are not worth an int, and from some thousands on Python makes none.
        if len(written) > 18 or int(written) > self._most_each:
            raise self._too_large()
        return int(written)

    def _too_large(self) -> BodyTooLarge:
        limit = f"{self._most_each} bytes ({self._most_each / 2**20:g} MiB: max_body_mib)"
        return BodyTooLarge(f"The body is over the server's limit of {limit}", parameter="body")

    def _take(self, client: str, beside: int, size: int) -> None:
        """Room for so much more of a client that holds `beside` with other bodies."""
        free = self._most_together - self._held.total() - size
        if free < 0 or 0 < beside > free:
            raise Overloaded(
                f"The server holds bodies of {self._held.total() / 2**20:.0f} MiB already, {beside / 2**20:.0f} of them yours, "
                "and has no room for this one; try again",
                retry_after=FULL_RETRY_S,
            )
        self._held[client] += size

    def _give(self, client: str, size: int) -> None:
        self._freed.of_body(size)
        self._held[client] -= size
        if not self._held[client]:
            del self._held[client]


class _Room:
    """What one body takes of the budget: what it has announced, or what has come of it."""

    def __init__(self, bodies: Bodies, client: str, announced: int) -> None:
        self._bodies, self._client, self._size = bodies, client, 0
        self.grow_to(announced)

    def grow_to(self, size: int) -> None:
        if size > self._size:
            beside = self._bodies._held[self._client] - self._size
            self._bodies._take(self._client, beside, size - self._size)
            self._size = size

    def give_back(self) -> None:
        self._bodies._give(self._client, self._size)
        self._size = 0


class _Pace:
    """Whether a body comes fast enough; who reads it is cancelled where it does not. (`asyncio.wait_for` would make a task of
    every piece.)"""

    def __init__(self, body: bytearray) -> None:
        self._loop = asyncio.get_running_loop()
        self._body, self._reader = body, asyncio.current_task()
        self.kept = True
        self._wait()

    def _wait(self) -> None:
        self._before = len(self._body)
        self._timer = self._loop.call_later(WINDOW_S, self._look)

    def _look(self) -> None:
        if len(self._body) - self._before >= WINDOW_S * LEAST_RATE:
            self._wait()
            return
        self.kept = False
        assert self._reader is not None
        self._reader.cancel()

    def forget(self) -> None:
        """The reader has taken the cancellation for what it was, and goes on."""
        assert self._reader is not None
        getattr(self._reader, "uncancel", int)()  # from Python 3.11 on they are counted

    def stop(self) -> None:
        self._timer.cancel()


@contextmanager
def _pace(body: bytearray) -> Iterator[_Pace]:
    pace = _Pace(body)
    try:
        yield pace
    finally:
        pace.stop()
