"""What runs inside Serve's HTTP proxy, and inside each replica that answers HTTP itself, before a body is buffered.

Serve calls `middlewares` where an environment variable names it (`ray_internals.MIDDLEWARE_VARIABLE`), which `remote-vae-serve
run` sees to; `startup_probe` finds out whether Serve did. From the inside out: `JSONErrors`, the proxy's own texts as the
contract's JSON; `SizeLimit`, a 413 before the body is read; `Tokens`, a 401. Plain ASGI: what a model answers passes through
message by message. Knows no Ray and no torch.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import math
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import environ

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from remote_vae import errors
from remote_vae.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    RemoteVAEError,
    Unauthorized,
    Unavailable,
    UnknownRoute,
    WrongMethod,
)
from remote_vae_serve.config import IngressConfig

logger = logging.getLogger("ray.serve")

IMPORT_PATH = "remote_vae_serve.proxy:middlewares"
TOKENS = "REMOTE_VAE_TOKENS"
MAX_BODY_MIB = "REMOTE_VAE_MAX_BODY_MIB"
"""Environment variables of ours, which the proxy's processes read, and those of deployments."""

OPEN = frozenset({"/health", "/health/", "/-/healthz"})
"""What probes read, without a token: our own, and Serve's, which HAProxy reads from every replica."""
RETRY_S = 2.0
BROKE_OFF = "The service broke off in the middle of the request; try again"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True)
class Settings:
    """What the environment says.

    Attributes:
        max_body: bytes of the largest request body.
        tokens: any of them lets a request in; empty lets everybody in. Not part of the repr, which Serve may log.
        linger_s, linger_idle_s: for how long what still comes of a refused body is dropped, in all and between two pieces.
            A connection closed with bytes unread is reset, and the client may lose the answer with it.
    """

    max_body: int
    tokens: tuple[str, ...] = field(default=(), repr=False)
    linger_s: float = 10.0
    linger_idle_s: float = 2.0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """Read them. Raises ValueError with a sentence that names the variable, and never a token."""
        return cls(_max_body(environment.get(MAX_BODY_MIB)), _tokens(environment.get(TOKENS)))


def _max_body(written: str | None) -> int:
    if written is None:
        return int(IngressConfig.model_validate({}).max_body_mib * 2**20)
    try:
        mib = float(written)
    except ValueError:
        mib = 0.0
    if not 0 < mib < math.inf:
        raise ValueError(f"{MAX_BODY_MIB} is {written!r}; expected a number of MiB above 0")
    return int(mib * 2**20)


def _tokens(written: str | None) -> tuple[str, ...]:
    if written is None:
        return ()
    tokens = tuple(token for token in map(str.strip, written.split(",")) if token)
    if not tokens:  # an empty secret must not open the door
        raise ValueError(f"{TOKENS} is set and holds no token; set one, or unset it to let everybody in")
    if not all(token.isascii() and token.isprintable() and " " not in token for token in tokens):
        raise ValueError(f"A token in {TOKENS} has a character that no header can carry; use letters and digits")
    return tokens


def middlewares() -> list[Middleware]:
    """What Serve's proxy wraps itself in, the innermost first. Raises ValueError where the environment is wrong."""
    settings = Settings.of(environ)
    layers = [Middleware(JSONErrors), Middleware(SizeLimit, settings)]
    return [*layers, Middleware(Tokens, settings)] if settings.tokens else layers


def behind_tokens(app: ASGIApp) -> ASGIApp:
    """A deployment's own app behind the same check of tokens once more: should Serve not call `middlewares`, or before that is
    found out, a request without a token still gets a 401. Raises ValueError where the environment is wrong."""
    settings = Settings.of(environ)
    if not settings.tokens:
        return app
    if isinstance(app, Starlette):  # it stays one, whose routes Serve reads to label its metrics
        app.add_middleware(Tokens, settings=settings)
        return app
    return Tokens(app, settings)


def haproxy_errors() -> list[str]:
    """What HAProxy says on its own account (its 502, 503 and 504), as lines of a `defaults` section of its configuration."""
    lines = ["unique-id-format %[uuid]"]
    for status, error in (
        (502, Unavailable(BROKE_OFF, retry_after=RETRY_S)),
        (503, Unavailable("The service cannot answer at the moment; try again", retry_after=RETRY_S)),
        (504, DeadlineExceeded("No result within the time-out of the proxy")),
    ):
        error.request_id = "%[unique-id]"
        _, headers, body = errors.render(error)
        content_type = headers.pop("content-type")
        rest = "".join(f" hdr {name} {value}" for name, value in (headers | {"x-request-id": error.request_id}).items())
        lines.append(f"http-error status {status} content-type {content_type}{rest} lf-string '{body.decode()}'")
    return lines


class Tokens:
    """Lets in who has a token: `Authorization: Bearer TOKEN`, or Basic with the token as password, as `http://:TOKEN@host`
    makes clients send that can set no header."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._tokens = [token.encode() for token in settings.tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope) or self._is_known(Headers(scope=scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket" and not _can_refuse(scope):
            await send({"type": "websocket.close", "code": 1008})
        else:
            sent = "authorization" in Headers(scope=scope)
            error = Unauthorized(
                "The token is not one of this server's"
                if sent
                else "A token is needed: send `Authorization: Bearer TOKEN`, or http://:TOKEN@host as the address"
            )
            await _refuse(error, self._settings, scope, receive, send)

    @staticmethod
    def _is_open(scope: Scope) -> bool:
        return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and _path(scope) in OPEN

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        sent = credentials.strip().encode("latin-1")
        if scheme.lower() == "basic":
            try:
                sent = base64.b64decode(sent, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        # Every token is compared, each in constant time: how long it takes says nothing of them.
        return sum(hmac.compare_digest(sent, token) for token in self._tokens) > 0


class SizeLimit:
    """Refuses a body over the limit: one that is announced before any of it is read, a chunked one when it gets there."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._limit = settings.max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        # More digits than any body has are not worth an int, and from some thousands on Python makes none.
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._limit):
            await _refuse(self._too_large(), self._settings, scope, receive, send)
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
        if over:
            await _refuse(self._too_large(), self._settings, scope, receive, send)

    def _too_large(self) -> RemoteVAEError:
        return BodyTooLarge(f"The body is over the server's limit of {self._limit} bytes", parameter="body")


class JSONErrors:
    """Serve's own answers (no application, its time-out, a full queue, an ingress that died) as the contract's JSON.

    Those are plain text, or no answer at all. Everything else passes through untouched, and so do Serve's own paths, `/-/`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and _can_refuse(scope):
            send = _handshake(scope, send)
        if scope["type"] != "http" or _path(scope).startswith("/-/"):
            await self._app(scope, receive, send)
            return
        started = False
        held: Message | None = None  # the start of a text answer, until its first words have come
        replaced = False

        async def translated(message: Message) -> None:
            nonlocal started, held, replaced
            if message["type"] == "http.response.start" and _is_serves_text(message):
                held = message
            elif held is not None:
                started = replaced = True
                error = _translate(held["status"], message.get("body", b""), _path(scope))
                headers, held = Headers(raw=held["headers"]), None
                if "retry-after" in headers:
                    error.retry_after = _seconds(headers["retry-after"], error.retry_after)
                await _answer(error, scope, send, request_id=headers.get("x-request-id", ""))
            elif not replaced:
                started = True
                await send(message)

        try:
            await self._app(scope, receive, translated)
        except Exception:
            if started:
                raise
            logger.exception("request %s failed in the proxy", _request_id(scope))
            await _answer(_translate(500, b"", _path(scope)), scope, send)
            return
        if not started:  # what Serve does when the process that should have answered is gone
            await _answer(Unavailable(BROKE_OFF, retry_after=RETRY_S), scope, send)


def _handshake(scope: Scope, send: Send) -> Send:
    """What the app says to a WebSocket, its refusal (a 403 without a word) as the contract's JSON."""
    answered = False

    async def translated(message: Message) -> None:
        nonlocal answered
        if message["type"] == "websocket.close" and not answered:
            await _answer(WrongMethod("No WebSocket is served here; decode is a POST to /<model>"), scope, send)
        else:
            await send(message)
        answered = True

    return translated


def _can_refuse(websocket: Scope) -> bool:
    """Whether the server lets a handshake be answered with more than a bare 403."""
    return "websocket.http.response" in websocket.get("extensions", {})


def _is_serves_text(message: Message) -> bool:
    content_type = Headers(raw=message.get("headers", [])).get("content-type", "text/plain")
    return message["status"] in (404, 408, 429, 500, 503) and content_type.startswith("text/plain")


def _translate(status: int, text: bytes, path: str) -> RemoteVAEError:
    """The error that a text answer of Serve's stands for. Its words are not passed on: they may show the inside."""
    if status == 404:
        return UnknownRoute(
            f"Nothing is served at {path[:80]!r}: no such route, or the service is still being deployed"
        )
    if status == 408:
        return DeadlineExceeded("No result within the server's request time-out")
    if status == 429 or (status == 503 and b"backpressure" in text):
        return Overloaded("The server's queue is full; try again", retry_after=RETRY_S)
    if status == 503:
        return Unavailable("The service cannot answer at the moment; try again", retry_after=RETRY_S)
    return InternalError("The server failed; its log has the details under this request id")


async def _refuse(error: RemoteVAEError, settings: Settings, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request whose body nobody will read."""
    sent = Headers(scope=scope)
    has_body = scope["type"] == "http" and (sent.get("content-length", "0") != "0" or "transfer-encoding" in sent)
    await _answer(error, scope, send, more=has_body)
    if has_body:
        await _drop(receive, settings)
        await send({"type": "http.response.body", "body": b""})


async def _answer(error: RemoteVAEError, scope: Scope, send: Send, request_id: str = "", more: bool = False) -> None:
    """Send the error; with `more`, the client has all of it while the exchange stays open until the connection closes."""
    error.request_id = request_id or _request_id(scope)
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


def _request_id(scope: Scope) -> str:
    """The request's number: the client's, or the one that Serve has put among its headers, or a new one."""
    sent = Headers(scope=scope).get("x-request-id", "")
    return sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _seconds(written: str, otherwise: float | None) -> float | None:
    return float(written) if written.isdecimal() else otherwise
