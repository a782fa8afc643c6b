"""Applications that fail as no code of ours should: what stands before them must still answer."""

from __future__ import annotations

import asyncio

from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

SECRET = "a secret of the inside"
SLEEP_S = 1.0


async def _raise(_: Request) -> Response:
    raise RuntimeError(SECRET)


async def _sleep(_: Request) -> Response:
    await asyncio.sleep(SLEEP_S)
    return Response("slept")


class Raises:
    """Raises before it has answered; `/sleep` takes its time, one at a time."""

    def __serve_build_asgi_app__(self) -> Starlette:
        both = ["GET", "POST"]
        return Starlette(
            routes=[
                Route("/sleep", _sleep, methods=both),
                Route("/{rest:path}", _raise, methods=both),
            ]
        )


class Fails:
    """Cannot be started."""

    def __init__(self) -> None:
        raise RuntimeError(SECRET)

    async def __call__(self, _: Request) -> str:
        return "up"


_small = {"ray_actor_options": {"num_cpus": 0}}
raises = serve.deployment(**_small, max_ongoing_requests=1, max_queued_requests=1)(serve.ingress()(Raises)).bind()
fails = serve.deployment(**_small)(Fails).bind()
