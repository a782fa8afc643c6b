"""`JSONErrors`: the texts of Serve's own errors as the JSON that every error of this server is."""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from remote_vae.errors import InternalError, RemoteVAEError, WrongMethod
from remote_vae_serve.middleware import serve_errors
from remote_vae_serve.middleware.refusal import answer, can_refuse, path_of, request_id_of

logger = logging.getLogger("ray.serve")


class JSONErrors:
    """Serve's own answers (no application, its time-out, a full queue, an ingress that died) as the contract's JSON.

    Those are plain text, or no answer at all. Everything else passes through untouched, and so do Serve's own paths, `/-/`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and can_refuse(scope):
            send = _handshake(scope, send)
        if scope["type"] != "http" or path_of(scope).startswith("/-/"):
            await self._app(scope, receive, send)
            return
        scope = _readable(scope)
        started = False
        held: Message | None = None  # the start of a text answer, until its first words have come
        replaced = False

        async def translated(message: Message) -> None:
            nonlocal started, held, replaced
            if message["type"] == "http.response.start" and _is_serves_text(message):
                held = message
            elif held is not None:
                started = replaced = True
                error = _translate(held["status"], message.get("body", b""), path_of(scope))
                headers, held = Headers(raw=held["headers"]), None
                if "retry-after" in headers:
                    error.retry_after = _seconds(headers["retry-after"], error.retry_after)
                await answer(error, scope, send, request_id=headers.get("x-request-id", ""))
            elif not replaced:
                started = True
                await send(message)

        try:
            await self._app(scope, receive, translated)
        except Exception:
            if started:
                raise
            logger.exception("request %s failed in the proxy", request_id_of(scope))
            await answer(_translate(500, b"", path_of(scope)), scope, send)
            return
        if not started:  # what Serve does when the process that should have answered is gone
            await answer(serve_errors.broke_off(), scope, send)


def _readable(scope: Scope) -> Scope:
    """Without headers that are no UTF-8: Serve reads all of them as such, and its 500 would be for somebody else's fault."""
    if all(name.isascii() and value.isascii() for name, value in scope["headers"]):
        return scope
    return {**scope, "headers": [header for header in scope["headers"] if all(map(_is_utf8, header))]}


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _handshake(scope: Scope, send: Send) -> Send:
    """What the app says to a WebSocket, its refusal (a 403 without a word) as the contract's JSON."""
    answered = False

    async def translated(message: Message) -> None:
        nonlocal answered
        if message["type"] == "websocket.close" and not answered:
            await answer(WrongMethod("No WebSocket is served here; decode is a POST to /<model>"), scope, send)
        else:
            await send(message)
        answered = True

    return translated


def _is_serves_text(message: Message) -> bool:
    content_type = Headers(raw=message.get("headers", [])).get("content-type", "text/plain")
    return message["status"] in (404, 408, 429, 500, 503) and content_type.startswith("text/plain")


def _translate(status: int, text: bytes, path: str) -> RemoteVAEError:
    """The error that a text answer of Serve's stands for. Its words are not passed on: they may show the inside."""
    if status == 404:
        return serve_errors.nothing_at(repr(path[: serve_errors.PATH_LENGTH])[1:-1])
    if status == 408:
        return serve_errors.timed_out()
    if status == 429 or (status == 503 and b"backpressure" in text):
        return serve_errors.full()
    if status == 503:
        return serve_errors.cannot_answer()
    return InternalError("The server failed; its log has the details under this request id")


def _seconds(written: str, otherwise: float | None) -> float | None:
    return float(written) if written.isdecimal() else otherwise
