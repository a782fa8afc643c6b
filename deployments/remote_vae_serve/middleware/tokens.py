"""`Tokens`: authorization by bearer token, before anything of a request is read."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from remote_vae.errors import Unauthorized
from remote_vae_serve.http.client_identity import CLIENT
from remote_vae_serve.middleware.refusal import can_refuse, path_of, refuse
from remote_vae_serve.middleware.settings import Settings

OPEN = frozenset({"/health", "/health/", "/-/healthz"})
"""What probes read, without a token: our own, and Serve's, which HAProxy reads from every replica."""


class Tokens:
    """Lets in who has a token: `Authorization: Bearer TOKEN`, or Basic with the token as password, as `http://:TOKEN@host`
    makes clients send that can set no header."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._tokens = [token.encode() for token in settings.tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
        elif (token := self._shown(Headers(scope=scope))) is not None:
            await self._app({**scope, CLIENT: _name(token)}, receive, send)
        elif scope["type"] == "websocket" and not can_refuse(scope):
            await send({"type": "websocket.close", "code": 1008})
        else:
            sent = "authorization" in Headers(scope=scope)
            error = Unauthorized(
                "The token is not one of this server's"
                if sent
                else "A token is needed: send `Authorization: Bearer TOKEN`, or http://:TOKEN@host as the address"
            )
            await refuse(error, self._settings, scope, receive, send)

    @staticmethod
    def _is_open(scope: Scope) -> bool:
        return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and path_of(scope) in OPEN

    def _shown(self, headers: Headers) -> bytes | None:
        """The token that was sent, where it is one of this server's."""
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        sent = credentials.strip().encode("latin-1")
        if scheme.lower() == "basic":
            try:
                sent = base64.b64decode(sent, validate=True).partition(b":")[2]
            except binascii.Error:
                return None
        elif scheme.lower() != "bearer":
            return None
        # Every token is compared, each in constant time: how long it takes says nothing of them.
        return sent if sum(hmac.compare_digest(sent, token) for token in self._tokens) > 0 else None


def _name(token: bytes) -> str:
    """What the token's holder is told apart by, in every process alike, and the token cannot be found from."""
    return hashlib.blake2b(token, digest_size=16, person=b"remote-vae").hexdigest()
