"""Answer a request in the middleware: an error as JSON, while the body that nobody will read is dropped."""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from remote_vae import errors
from remote_vae.errors import RemoteVAEError, Unauthorized
from remote_vae_serve.middleware.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


async def refuse(error: RemoteVAEError, settings: Settings, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request whose body nobody will read."""
    sent = Headers(scope=scope)
    has_body = scope["type"] == "http" and (sent.get("content-length", "0") != "0" or "transfer-encoding" in sent)
    await answer(error, scope, send, more=has_body)
    if has_body:
        await _drop(receive, settings)
        await send({"type": "http.response.body", "body": b""})


async def answer(error: RemoteVAEError, scope: Scope, send: Send, request_id: str = "", more: bool = False) -> None:
    """Send the error; with `more`, the client has all of it while the exchange stays open until the connection closes."""
    error.request_id = request_id or request_id_of(scope)
    status, headers, body = errors.render(error)
    headers |= {"content-length": str(len(body)), "x-request-id": error.request_id}
    if more:
        headers["connection"] = "close"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    answer = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    await send({"type": f"{answer}.start", "status": status, "headers": raw})
    await send({"type": f"{answer}.body", "body": body, "more_body": more})


async def _drop(receive: Receive, settings: Settings) -> None:
    give_up = time.monotonic() + settings.linger_s
    while time.monotonic() < give_up:
        try:
            message = await asyncio.wait_for(receive(), settings.linger_idle_s)
        except asyncio.TimeoutError:
            return
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


def request_id_of(scope: Scope) -> str:
    """The request's number: the client's, or the one that Serve has put among its headers, or a new one."""
    sent = Headers(scope=scope).get("x-request-id", "")
    return sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def path_of(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def can_refuse(websocket: Scope) -> bool:
    """Whether the server lets a handshake be answered with more than a bare 403."""
    return "websocket.http.response" in websocket.get("extensions", {})
