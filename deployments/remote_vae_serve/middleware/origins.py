"""`Origins`: CORS, and the refusal of pages that are not allowed: who may use this server from a browser."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from remote_vae.errors import Forbidden, RemoteVAEError, WrongMethod
from remote_vae_serve.allowed_origins import METHODS, SHOWN, is_own
from remote_vae_serve.middleware.refusal import refuse
from remote_vae_serve.middleware.settings import Settings

MAX_AGE_S = 600
"""For so long a browser does not ask again."""
_CHECKED = "remote_vae.origin_checked"
"""Key of the ASGI scope: a layer further out has done it, in Serve's proxy or in this process, and adds the headers."""


class Origins:
    """Answers the preflights of pages that `allow_origins` names, and has every answer to them readable, errors included.

    Where no token is asked for, any page that somebody opens could else use a server that only they can reach, on loopback or
    behind a firewall: browsers send a POST first, and look afterwards whether the page may read the answer. So a request of
    another origin is refused there, with a 403. One without an Origin, as clients that are no browsers send it, passes untouched.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._cors = CORSMiddleware(
            app,
            allow_origins=settings.allow_origins or (),
            allow_methods=METHODS,
            allow_headers=["*"],  # those that are asked for, Authorization among them
            allow_private_network=True,  # what is allowed by name is allowed from the internet too
            expose_headers=["*"],  # shape, dtype, x-vae-*, retry-after, ...: nothing here is kept from who may ask
            max_age=MAX_AGE_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" and _CHECKED not in scope else None
        if origin is None:
            await self._app(scope, receive, send)
            return
        scope = {**scope, _CHECKED: True}
        if self._cors.is_allowed_origin(origin):
            await self._allowed(scope, receive, send)
        elif self._settings.tokens or is_own(origin, Headers(scope=scope).get("host", "")):
            await self._app(scope, receive, send)
        else:
            await refuse(_forbidden(origin), self._settings, scope, receive, send)

    async def _allowed(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope).get("access-control-request-method", METHODS[0])
        if scope["method"] == "OPTIONS" and asked not in METHODS:  # Starlette would say so in plain text
            error = WrongMethod(f"Pages may send {', '.join(METHODS)}; decoding and encoding are a POST to /<model>")
            await refuse(error, self._settings, scope, receive, send)
        else:
            await self._cors(scope, receive, send)


def _forbidden(origin: str) -> RemoteVAEError:
    return Forbidden(
        f"A page of {origin[:SHOWN]!r} may not use this server: Origin is expected to be the server's own, the address in Host, "
        "or one of those that allow_origins lists (remote-vae-serve run --allow-origin)",
        parameter="origin",
    )
