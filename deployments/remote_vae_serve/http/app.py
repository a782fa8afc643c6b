"""The HTTP routes of decode, encode and describe: one Starlette app, for the ingress and for a replica's own path alike, over one
seam (`Models`), which maps a name to something that decodes.

Knows no Ray and no torch. Whatever goes wrong is answered with the JSON of `remote_vae.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from remote_vae import errors
from remote_vae.errors import (
    DeadlineExceeded,
    InternalError,
    RemoteVAEError,
    UnknownRoute,
    WrongMethod,
)
from remote_vae.protocol.messages import DEADLINE_HEADER, Transfer, deadline_of
from remote_vae.protocol.request import Request as VAERequest
from remote_vae.protocol.request import Verb, read_announced, read_request
from remote_vae.protocol.result import Result
from remote_vae_serve.http.bodies import Bodies
from remote_vae_serve.http.client_identity import LOOPBACK, ClientIdentity
from remote_vae_serve.http.models import Answerer, Models
from remote_vae_serve.http.openapi import document
from remote_vae_serve.http.responses import BY_PROXY, reply
from remote_vae_serve.http.turns import Turns

logger = logging.getLogger("ray.serve")

Endpoint = Callable[[Request], Awaitable[Response]]

EVERY = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
RESERVED = frozenset({"health", "models", "openapi.json"})
"""Names that are paths of this app, so that no model can have them."""
MAX_BODIES = 2**30
ANNOUNCE_S = 10.0
"""Longer than it takes to forecast the memory of the largest shape."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def create_app(
    models: Models,
    max_body: int,
    deadline_s: float,
    hosts: Mapping[str, str] = MappingProxyType({}),
    has_connections: bool = False,
    max_bodies: int = MAX_BODIES,
    trusted_proxies: Sequence[str] = LOOPBACK,
) -> Starlette:
    """The app.

    Args:
        max_body: largest request body in bytes.
        deadline_s: seconds after which a request is answered with a 504; sooner where its client says so.
        hosts: Host name, without port, to model: what a POST to `/` means.
        has_connections: whether they are this process's own, or Serve's proxy has them.
        max_bodies: bytes of all bodies that are held at once.
        trusted_proxies: networks whose X-Forwarded-For says who asks.
    """
    to = Endpoints(models, Bodies(max_body, max_bodies), deadline_s, hosts, "", has_connections, trusted_proxies)
    return _app(
        to,
        Route("/", to.guarded(to.by_host), methods=EVERY),
        *to.route("/health", to.health, "GET"),
        *to.route("/openapi.json", to.openapi, "GET"),
        *to.route("/models", to.models, "GET"),
        *to.route("/{model}", to.model, "GET", "POST"),
        *to.route("/{model}/decode", to.decode, "POST"),
        *to.route("/{model}/encode", to.encode, "POST"),
        *to.route("/{model}/describe", to.wake, "POST"),
    )


def create_model_app(
    name: str,
    models: Models,
    max_body: int,
    deadline_s: float,
    has_connections: bool = False,
    max_bodies: int = MAX_BODIES,
    trusted_proxies: Sequence[str] = LOOPBACK,
) -> ASGIApp:
    """The same for the model `name` alone, to be hung at its own path: the direct door."""
    to = Endpoints(models, Bodies(max_body, max_bodies), deadline_s, {}, name, has_connections, trusted_proxies)
    app = _app(
        to,
        Route("/", to.guarded(to.model), methods=["GET", "POST"]),  # first: routes are tried in turn
        Route("/", to.guarded(to.wrong_method), methods=EVERY),
        *to.route("/health", to.health, "GET"),
        *to.route("/openapi.json", to.openapi, "GET"),
        *to.route("/decode", to.decode, "POST"),
        *to.route("/encode", to.encode, "POST"),
        *to.route("/describe", to.wake, "POST"),
    )

    async def with_slash(scope: Scope, receive: Receive, send: Send) -> None:
        # Where it hangs at /sd-v1, a POST to /sd-v1 has no path left, and Starlette would send it to /sd-v1/ with a 307.
        if scope["type"] == "http" and scope["path"] == scope.get("root_path", ""):
            scope = {**scope, "path": scope["path"] + "/"}
        await app(scope, receive, send)

    return with_slash


def _app(to: Endpoints, *routes: Route) -> Starlette:
    handlers: dict[Any, Any] = {404: _handler(to.guarded(to.unknown)), 405: _handler(to.guarded(to.wrong_method))}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class Endpoints:
    """The routes' handlers. Each raises RemoteVAEError; `guarded` makes the response of it."""

    def __init__(
        self,
        models: Models,
        bodies: Bodies,
        deadline_s: float,
        hosts: Mapping[str, str],
        only: str,
        has_connections: bool,
        trusted_proxies: Sequence[str],
    ) -> None:
        self._identity = ClientIdentity(trusted_proxies)
        self._turns = Turns()
        self._has_connections = has_connections
        self._models = models
        self._only = only
        self._bodies = bodies
        self._deadline_s = deadline_s
        self._hosts = {host.lower(): name for host, name in hosts.items()}

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "models": len(self._models.names())})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"models": [self._models.describe(name).to_plain() for name in self._models.names()]})

    async def wake(self, request: Request) -> Response:
        description = await asyncio.wait_for(self._models.wake(self._name(request)), self._deadline_s)
        request.state.model = self._name(request)
        return JSONResponse(description.to_plain())

    async def decode(self, request: Request) -> Response:
        return await self._answer(request, self._name(request), "decode")

    async def encode(self, request: Request) -> Response:
        return await self._answer(request, self._name(request), "encode")

    async def model(self, request: Request) -> Response:
        if request.method in ("GET", "HEAD"):
            name = self._name(request)
            description = self._models.describe(name)
            request.state.model = name
            if (waiting := request.query_params.get("waiting")) is not None:
                description = replace(description, ahead=self._turns.ahead(name, waiting, description.replicas or 1))
            return JSONResponse(description.to_plain())
        return await self._answer(request, self._name(request), None)

    async def by_host(self, request: Request) -> Response:
        """The way of clients that hold a host name for an endpoint, and no path."""
        name = self._hosts.get(request.headers.get("host", "").partition(":")[0].lower())
        if request.method != "POST" or name is None:
            return await self.unknown(request)
        return await self._answer(request, name, None)

    async def unknown(self, request: Request) -> Response:
        raise UnknownRoute(f"No route {_path(request)!r}; POST to /<model> or GET /models, /<model>, /health")

    async def wrong_method(self, request: Request) -> Response:
        raise WrongMethod(
            f"{request.method} is not for {_path(request)!r}; decoding and encoding are a POST to /<model>, "
            "reading is a GET"
        )

    async def _answer(self, request: Request, name: str, verb: Verb | None) -> Response:
        """Read the request, have the model answer it, write its result."""
        now = asyncio.get_running_loop().time
        began = now()
        client = self._identity.of(request)

        def told(read: VAERequest) -> VAERequest:
            return replace(read, deadline_s=max(give_up - now(), 0.001), client=client)

        async def read_and_answer(model: Answerer) -> tuple[Transfer, Result]:
            query, headers = _query(request), _headers(request)
            await _announce(model, read_announced(verb, query, headers, self._bodies.announced(request)), told)
            async with self._bodies.read(request, client) as body:
                read = read_request(verb, query, headers, body)
                return read.reply, await _unless_gone(request, model.answer(told(read)))

        with self._models.place(name, client) as model, self._turns.turn(name, request.state.id):
            # Before the body: what is refused is not worth reading it.
            request.state.model = name
            give_up = began + min(deadline_of(request.headers) or self._deadline_s, self._deadline_s)
            transfer, result = await asyncio.wait_for(read_and_answer(model), give_up - now())
        headers, body = result.to_http(transfer)
        return reply(headers, memoryview(body), self._has_connections and BY_PROXY not in request.scope)

    def _name(self, request: Request) -> str:
        """The model that a path means; where it names none, the one that lives at this door."""
        return str(request.path_params.get("model", self._only))

    def route(self, path: str, endpoint: Endpoint, *methods: str) -> list[Route]:
        # Both spellings are answered: Starlette's redirect (307) would make the client send its body twice.
        spellings = (path, path + "/")
        right = [Route(spelling, self.guarded(endpoint), methods=list(methods)) for spelling in spellings]
        # What a path is not for is said there, before `/{model}` takes its name for a model's.
        return right + [Route(spelling, self.guarded(self.wrong_method), methods=EVERY) for spelling in spellings]

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint with every failure turned into the contract's JSON; on every answer the request's id and, where a
        model is concerned, its name."""

        async def run(request: Request) -> Response:
            sent = request.headers.get("x-request-id", "")
            request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
            request.state.id = request_id
            try:
                response = await _letting_go(endpoint, request)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except DeadlineExceeded as error:
                response = _answer(error, request_id)
            except (TimeoutError, asyncio.TimeoutError):
                response = _answer(DeadlineExceeded(_too_late(request, self._deadline_s)), request_id)
            except RemoteVAEError as error:
                response = _answer(error, request_id)
            except Exception:
                logger.exception("request %s failed", request_id)
                response = _answer(
                    InternalError("The server failed; its log has the details under this request id"), request_id
                )
            if model := getattr(request.state, "model", ""):  # of errors; a result says so itself
                response.headers["x-vae-model"] = model
            # A proxy that numbers requests, as Serve's does, puts its number on the answer itself.
            if sent != request_id:
                response.headers["x-request-id"] = request_id
            return response

        return run


async def _announce(model: Answerer, announced: VAERequest | None, told: Callable[[VAERequest], VAERequest]) -> None:
    """Tell the model of a request whose body comes next. It is read as well where the model does not say anything for a while."""
    if announced is None:
        return
    # A deadline that is only the server's own refuses nobody.
    request = told(announced) if announced.deadline_s is not None else replace(told(announced), deadline_s=None)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(model.announce(request), ANNOUNCE_S)


async def _letting_go(endpoint: Endpoint, request: Request) -> Response:
    """What the endpoint answers. What it raises holds frames, one of them a task that holds the error: with the body in them
    they would wait for the garbage collector."""
    try:
        return await endpoint(request)
    except BaseException as error:
        errors.let_go_of_frames(error)
        raise


def _path(request: Request) -> str:
    path: str = request.scope["path"]  # `request.url` reads the query too, which may be no UTF-8
    return (path.rstrip("/") or "/")[:200]


def _too_late(request: Request, deadline_s: float) -> str:
    if request.headers.get(DEADLINE_HEADER) and (deadline_of(request.headers) or deadline_s) < deadline_s:
        return f"No result within the {request.headers[DEADLINE_HEADER]} ms that the client gives it"
    return f"No result within the server's deadline of {deadline_s:g} s"


def _handler(endpoint: Endpoint) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, _: Exception) -> Response:
        return await endpoint(request)

    return handle


def _query(request: Request) -> list[tuple[str, str]]:
    """Decoded pairs, as Starlette's `query_params` has them, which makes three mappings of them besides."""
    return parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)


def _headers(request: Request) -> dict[str, str]:
    """By lower-case name; of several the first. `dict(request.headers)` would look each name up in all of them."""
    return dict(reversed(request.headers.items()))


async def _unless_gone(request: Request, answer: Awaitable[Result]) -> Result:
    """The answer, given up where its client hangs up. Serve cancels as well, unless the client's header tells it not to look.
    Raises ClientDisconnect."""
    answering, going = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answering, going}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() and going.exception() is None:
            raise ClientDisconnect
        return await answering
    finally:
        answering.cancel()
        going.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


def _answer(error: RemoteVAEError, request_id: str) -> Response:
    error.request_id = request_id
    status, headers, body = errors.render(error)
    return Response(body, status, headers)
