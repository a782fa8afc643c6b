"""The middleware of Serve's HTTP proxy, and of each replica that answers HTTP itself: it runs before a body is buffered.

Serve calls `middlewares` where an environment variable names it (`ray_internals.MIDDLEWARE_VARIABLE`), which `remote-vae-serve
run` sees to; `startup_probe` finds out whether Serve did. From the inside out: `JSONErrors`, the proxy's own texts as the
contract's JSON; `SizeLimit`, a 413 before the body is read; `Tokens`, a 401; `Origins`, CORS, and a 403 for pages of others.
Under HAProxy Serve's proxy, its fallback proxy then, has `ToIngress` inside of them. Plain ASGI: what a model answers passes
through message by message. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import environ

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from remote_vae.ray_internals import is_fallback_proxy
from remote_vae_serve.middleware.json_errors import JSONErrors
from remote_vae_serve.middleware.origins import Origins
from remote_vae_serve.middleware.settings import Settings
from remote_vae_serve.middleware.size_limit import SizeLimit
from remote_vae_serve.middleware.to_ingress import ToIngress
from remote_vae_serve.middleware.tokens import Tokens
from remote_vae_serve.published_paths import published

IMPORT_PATH = "remote_vae_serve.proxy:middlewares"


def middlewares() -> list[Middleware]:
    """What Serve's proxy wraps itself in, the innermost first. Raises ValueError where the environment is wrong."""
    settings = Settings.of(environ)
    layers = [Middleware(JSONErrors), Middleware(SizeLimit, settings)]
    if is_fallback_proxy():
        layers.insert(0, Middleware(ToIngress, published))
    if settings.tokens:
        layers.append(Middleware(Tokens, settings))
    return [*layers, Middleware(Origins, settings)]


def guarded(app: ASGIApp, allow_origins: Sequence[str] = ()) -> ASGIApp:
    """A deployment's own app behind the same checks of tokens and origins once more: should Serve not call `middlewares`, or
    before that is found out, a request without a token still gets a 401, and a foreign page a 403.

    Args:
        allow_origins: of the deployment's arguments; what the environment says goes before them.

    Raises:
        ValueError: where the environment is wrong.
    """
    settings = Settings.of(environ)
    if settings.allow_origins is None:
        settings = replace(settings, allow_origins=tuple(allow_origins))
    for layer in (Tokens, Origins) if settings.tokens else (Origins,):
        if isinstance(app, Starlette):  # it stays one, whose routes Serve reads to label its metrics
            app.add_middleware(layer, settings=settings)
        else:
            app = layer(app, settings)
    return app
