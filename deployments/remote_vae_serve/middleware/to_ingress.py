"""`ToIngress`: path rewrite in Serve's fallback proxy: a request to a model that has no replica goes through the ingress.

Under HAProxy a model answers at its own path. While it has no replica, Serve has HAProxy ask the fallback proxy instead, which by
itself would wake it for a GET as well, and wait without a word. The ingress knows better.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

from remote_vae_serve.middleware.refusal import path_of
from remote_vae_serve.published_paths import BY_INGRESS

logger = logging.getLogger("ray.serve")


class ToIngress:
    """Rewrites the path of a model's own to one of the ingress: `/sd-v1/decode` to `/~/sd-v1/decode`.

    Args:
        paths: reads the models by their paths. It may take a while: it runs in a thread.
    """

    def __init__(self, app: ASGIApp, paths: Callable[[], Mapping[str, str]]) -> None:
        self._app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and not path_of(scope).startswith("/-/"):
            scope = await self._rewritten(scope)
        await self._app(scope, receive, send)

    async def _rewritten(self, scope: Scope) -> Scope:
        path = path_of(scope)
        try:
            paths = await asyncio.to_thread(self._paths)
        except Exception:  # Ray's control plane restarts: Serve itself still knows the way
            logger.warning("the models' paths could not be read", exc_info=True)
            return scope
        # The longest first, as Serve has it: of /a and /a/b the second is meant by /a/b/decode.
        own = max((one for one in paths if path == one or path.startswith(f"{one}/")), key=len, default=None)
        if own is None:
            return scope
        path = f"{scope.get('root_path', '')}{BY_INGRESS}/{paths[own]}{path.removeprefix(own)}"
        return {**scope, "path": path, "raw_path": quote(path).encode()}
