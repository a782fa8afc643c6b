"""`SizeLimit`: a limit on request bodies that holds before one is buffered, and where their memory is given back."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from remote_vae.errors import BodyTooLarge, RemoteVAEError
from remote_vae_serve.http.freed_memory import FreedMemory
from remote_vae_serve.middleware.refusal import refuse
from remote_vae_serve.middleware.settings import Settings


class SizeLimit:
    """Refuses a body over the limit: one that is announced before any of it is read, a chunked one when it gets there."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._limit = settings.max_body
        self._freed = FreedMemory()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        # More digits than any body has are not worth an int, and from some thousands on Python makes none.
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._limit):
            await refuse(self._too_large(), self._settings, scope, receive, send)
            return

        started = over = False
        read = 0

        async def counted() -> Message:
            nonlocal read, over
            message = await receive()
            read += len(message.get("body", b""))
            if read <= self._limit:
                return message
            if started:  # the answer is on its way already: it goes on, and the rest of the body is dropped
                return {**message, "body": b""}
            over = True
            return {"type": "http.disconnect"}

        async def watched(message: Message) -> None:
            nonlocal started
            if not over:  # what the app says of the disconnect that it was told of is for nobody
                started = True
                await send(message)

        try:
            await self._app(scope, counted, watched)
        except BaseException as error:
            # A replica that answers HTTP itself cancels its own call when the client is gone.
            if not over or not isinstance(error, (Exception, asyncio.CancelledError)):
                raise
        finally:
            self._freed.of_body(read)
        if over:
            await refuse(self._too_large(), self._settings, scope, receive, send)

    def _too_large(self) -> RemoteVAEError:
        return BodyTooLarge(f"The body is over the server's limit of {self._limit} bytes", parameter="body")
