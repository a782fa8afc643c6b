"""The floor of Ray Serve: an application that reads the body and answers with bytes it has ready, as the bare uvicorn of peers.py
does, at `/bare` beside ours. What it takes is what Serve and HAProxy take, whatever is behind them.

No `from __future__ import annotations`: Serve reads a builder's annotations as they stand.
"""

from typing import Any

from ray import serve
from starlette.types import Receive, Scope, Send

PATH = "/bare"


class Bare:
    """Answers with so many bytes."""

    def __init__(self, size: int) -> None:
        self._answer = bytes(size)

    def __serve_build_asgi_app__(self) -> Any:
        answer = self._answer
        length = str(len(answer)).encode()

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                return
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
            await send({"type": "http.response.body", "body": answer})

        return respond


def app(args: dict[str, Any]) -> serve.Application:
    options = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 100}
    return serve.deployment(serve.ingress()(Bare), name="Bare", **options).bind(args["size"])


def application(size: int) -> dict[str, Any]:
    """For the configuration of a server."""
    return {"name": "bare", "route_prefix": PATH, "import_path": "benchmarks.bare_serve:app", "args": {"size": size}}
