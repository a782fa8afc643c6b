"""The HTTP side, written once: a Starlette app over one seam (`Models`), which maps a name to something that decodes.

Knows no Ray and no torch. Whatever goes wrong is answered with the JSON of `remote_vae.errors`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from remote_vae import errors
from remote_vae.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    InternalError,
    RemoteVAEError,
    UnknownRoute,
    WrongMethod,
)
from remote_vae.wire import DecodeRequest, Result

logger = logging.getLogger("ray.serve")

Endpoint = Callable[[Request], Awaitable[Response]]

EVERY = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
RESERVED = frozenset({"health", "models", "openapi.json"})
"""Names that are paths of this app, so that no model can have them."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


Decoder = Callable[[DecodeRequest], Awaitable[Result]]
"""One model, somewhere. Raises RemoteVAEError."""


class Models(Protocol):
    """The models that this app serves."""

    def find(self, name: str) -> Decoder:
        """The model of that name. Raises UnknownModel, or Unavailable where it exists and cannot answer."""

    def describe(self, name: str) -> dict[str, Any]:
        """What is known of it, without waking it. Raises UnknownModel."""

    def names(self) -> list[str]:
        """All names, sorted."""


def create_app(models: Models, max_body: int, deadline_s: float) -> Starlette:
    """The app.

    Args:
        max_body: largest request body in bytes.
        deadline_s: seconds after which a request is answered with a 504.
    """

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "models": len(models.names())})

    async def list_models(request: Request) -> Response:
        return JSONResponse({"models": [models.describe(name) for name in models.names()]})

    async def describe(request: Request) -> Response:
        return JSONResponse(models.describe(request.path_params["model"]))

    async def decode(request: Request) -> Response:
        name = request.path_params["model"]
        decoder = models.find(name)  # before the body: an unknown model is not worth reading it

        async def read_and_decode() -> tuple[DecodeRequest, Result]:
            body = await _read(request, max_body)
            read = DecodeRequest.from_http(request.query_params.multi_items(), dict(request.headers), body)
            return read, await decoder(read)

        decode_request, result = await asyncio.wait_for(read_and_decode(), deadline_s)
        answer_headers, answer = result.to_http(decode_request.reply)
        return Response(bytes(answer), headers=answer_headers)

    async def model(request: Request) -> Response:
        if request.method in ("GET", "HEAD"):
            return await describe(request)
        return await decode(request)

    def guarded(endpoint: Endpoint) -> Endpoint:
        """The endpoint with every failure turned into the contract's JSON, and the request's id on every answer."""

        async def run(request: Request) -> Response:
            sent = request.headers.get("x-request-id", "")
            request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
            try:
                response = await endpoint(request)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except (TimeoutError, asyncio.TimeoutError):
                response = _answer(
                    DeadlineExceeded(f"No result within the server's deadline of {deadline_s:g} s"), request_id
                )
            except RemoteVAEError as error:
                response = _answer(error, request_id)
            except Exception:
                logger.exception("request %s failed", request_id)
                response = _answer(
                    InternalError("The server failed; its log has the details under this request id"), request_id
                )
            if not sent:  # a proxy that numbers requests, as Serve's does, puts its number on the answer itself
                response.headers["x-request-id"] = request_id
            return response

        return run

    async def unknown(request: Request) -> Response:
        raise UnknownRoute(f"No route {request.url.path[:200]!r}; POST to /<model> or GET /models, /<model>, /health")

    async def wrong_method(request: Request) -> Response:
        raise WrongMethod(
            f"{request.method} is not for {request.url.path[:200]!r}; decode is a POST to /<model>, reading a GET"
        )

    def route(path: str, endpoint: Endpoint, *methods: str) -> list[Route]:
        # Both spellings are answered: Starlette's redirect (307) would make the client send its body twice.
        spellings = (path, path + "/")
        right = [Route(spelling, guarded(endpoint), methods=list(methods)) for spelling in spellings]
        # What a path is not for is said there, before `/{model}` takes its name for a model's.
        return right + [Route(spelling, guarded(wrong_method), methods=EVERY) for spelling in spellings]

    handlers: dict[Any, Any] = {404: _handler(guarded(unknown)), 405: _handler(guarded(wrong_method))}
    app = Starlette(
        routes=[
            *route("/health", health, "GET"),
            *route("/models", list_models, "GET"),
            *route("/{model}", model, "GET", "POST"),
            *route("/{model}/decode", decode, "POST"),
        ],
        exception_handlers=handlers,
    )
    app.router.redirect_slashes = False
    return app


def _handler(endpoint: Endpoint) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, _: Exception) -> Response:
        return await endpoint(request)

    return handle


async def _read(request: Request, max_body: int) -> bytearray:
    """The whole body, read no further than the limit."""
    limit = f"{max_body} bytes ({max_body / 2**20:g} MiB: max_body_mib)"
    too_large = BodyTooLarge(f"The body is over the server's limit of {limit}", parameter="body")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_body):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body:
            raise too_large
    return body


def _answer(error: RemoteVAEError, request_id: str) -> Response:
    error.request_id = request_id
    status, headers, body = errors.render(error)
    return Response(body, status, headers)
