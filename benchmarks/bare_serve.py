"""The floors of Ray Serve: an application that reads the body and answers with bytes it has ready, as the bare uvicorn of
peers.py does, at `/bare` beside ours; and one whose ingress has another deployment answer, by a handle, at `/relayed`. What they
take is what Serve and HAProxy take, whatever is behind them.

No `from __future__ import annotations`: Serve reads a builder's annotations as they stand.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from remote_vae import ray_internals

PATH, RELAYED = "/bare", "/relayed"
OPTIONS = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 100}


class Bare:
    """Answers with so many bytes."""

    def __init__(self, size: int) -> None:
        self._answer = bytes(size)

    async def answer(self, body: bytes) -> bytes:
        return self._answer

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _app(self.answer)


class Relay:
    """Has another deployment answer: request and reply in a gRPC message."""

    def __init__(self, bare: Any) -> None:
        self._bare = ray_internals.by_value(bare)

    async def answer(self, body: bytes) -> bytes:
        answered: bytes = await self._bare.answer.remote(body)
        return answered

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _app(self.answer)


def _app(answer: Callable[[bytes], Awaitable[bytes]]) -> ASGIApp:
    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        pieces, more = [], True
        while more:
            message = await receive()
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = await answer(b"".join(pieces))
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return respond


def app(args: dict[str, Any]) -> serve.Application:
    return serve.deployment(serve.ingress()(Bare), name="Bare", **OPTIONS).bind(args["size"])


def relayed(args: dict[str, Any]) -> serve.Application:
    bare = serve.deployment(Bare, name="Bare", **OPTIONS).bind(args["size"])
    return serve.deployment(serve.ingress()(Relay), name="Relay", **OPTIONS).bind(bare)


def application(size: int) -> dict[str, Any]:
    """For the configuration of a server."""
    return {"name": "bare", "route_prefix": PATH, "import_path": "benchmarks.bare_serve:app", "args": {"size": size}}


def relayed_application(size: int) -> dict[str, Any]:
    """For the configuration of a server."""
    where = "benchmarks.bare_serve:relayed"
    return {"name": "relayed", "route_prefix": RELAYED, "import_path": where, "args": {"size": size}}
