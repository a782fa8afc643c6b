"""`ByIngress`: a model at `/~/<model>` of the ingress, where the fallback proxy sends what is for one that has no replica."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from remote_vae_serve.http.responses import BY_PROXY
from remote_vae_serve.published_paths import BY_INGRESS


class ByIngress:
    """Answers `/~/sd-v1/decode` as `/sd-v1/decode`, in the words of that path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root: str = scope.get("root_path", "")
        if scope["type"] == "http" and scope["path"].startswith(f"{root}{BY_INGRESS}/"):
            scope = {**scope, "path": root + scope["path"].removeprefix(root + BY_INGRESS), BY_PROXY: True}
        await self._app(scope, receive, send)
