"""The user's own server: where it is, the token for it, which models it reports."""

from __future__ import annotations

import os
import time
from urllib.parse import quote, unquote, urlsplit

from remote_vae import RemoteVAEError, list_models
from remote_vae.errors import BadRequest

DEFAULT_URL = "http://127.0.0.1:8000"
IN_URL = "(named in the URL)"
"""Entry of the model list that takes the URL as it is, its path included: for a model that the list does not have."""

LIST_TIMEOUT_S = 2.0
"""ComfyUI fills its lists in the event loop of its own server, which stands still meanwhile."""
KEEP_S = 10.0
_listed: dict[str, tuple[float, list[str]]] = {}


def home() -> str:
    """The server in REMOTE_VAE_URL, without the token that may stand in it: this is what workflows are saved with."""
    parts = urlsplit(os.environ.get("REMOTE_VAE_URL") or DEFAULT_URL)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def token_for(url: str) -> str | None:
    """The token of REMOTE_VAE_TOKEN, or of REMOTE_VAE_URL, if `url` is on the server of REMOTE_VAE_URL.

    A workflow comes from anywhere, and its URL with it; the token goes to the user's own server and nowhere else.
    """
    if "@" in urlsplit(url).netloc or _server(url) != _server(home()):
        return None
    password = urlsplit(os.environ.get("REMOTE_VAE_URL") or "").password
    return os.environ.get("REMOTE_VAE_TOKEN") or (unquote(password) if password else None)


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def models() -> list[str]:
    """For the list in the node: the models that the server of REMOTE_VAE_URL reports, then `IN_URL`; only that, where it is
    down. Asked at most every `KEEP_S` seconds: ComfyUI calls it for each node, and again at each run."""
    url = home()
    asked, names = _listed.get(url, (float("-inf"), []))
    if time.monotonic() - asked > KEEP_S:
        try:
            names = _names(url, LIST_TIMEOUT_S, retries=0)
        except RemoteVAEError:
            names = []
        _listed[url] = (time.monotonic(), names)
    return [*names, IN_URL]


def endpoint(url: str, model: str) -> str:
    """The URL of the model. Raises BadRequest where none is named."""
    url = url.strip().rstrip("/")
    if model != IN_URL:
        return f"{url}/{quote(model, safe='')}"
    if not urlsplit(url).path:
        shown = home() if url == home() else "it"
        raise BadRequest(
            f"No model is chosen. Choose one in the list, or write it into the URL, as in {shown}/sd-v1; "
            f"the server has: {', '.join(_names(url))}",
            parameter="model",
        )
    return url


def _names(url: str, timeout: float = 10.0, retries: int = 1) -> list[str]:
    models = list_models(url, timeout=timeout, retries=retries, token=token_for(url))
    return [str(model["name"]) for model in models]
