"""`Announcements`: requests whose bodies have not come yet, checked by shape and memory, so that what is refused is not uploaded.

Forecasting the memory of a large shape that is new takes seconds of a core, and an announcement costs its sender nothing: they
are forecast one at a time, beside the threads that unpack, and for a tenth of the time at most. What is not checked is let in,
and hears the same when it has come.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.request import Request
from remote_vae_serve.engine.base import Engine

REST = 9.0
"""Times as long as a forecast took, none is made."""


class Announcements:
    """The announced requests of one model; call it from one event loop.

    Args:
        engine: loaded.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._processor = engine, engine.processor
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="announced")
        self._is_busy = False
        self._rests_until = 0.0

    async def check(self, request: Request) -> None:
        """Raises BadRequest where the model does not take such a shape, with such hints, or its memory does not."""
        if isinstance(request, DecodeRequest):
            shape, hints = self._processor.announced_latents(request)
        else:
            shape, hints = self._processor.announced_pixels(request), None
        if self._is_busy or time.monotonic() < self._rests_until:
            return
        self._is_busy = True
        if hints is None:
            planned = self._pool.submit(self._engine.plan_encode, shape)
        else:
            planned = self._pool.submit(self._engine.plan_decode, shape, hints)
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        planned.add_done_callback(lambda _: loop.call_soon_threadsafe(self._rest, time.monotonic() - began))
        await asyncio.wrap_future(planned)

    def _rest(self, took_s: float) -> None:
        self._is_busy = False
        self._rests_until = time.monotonic() + REST * took_s

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
