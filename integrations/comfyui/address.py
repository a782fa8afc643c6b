"""The user's own server: where it is, the token for it, which models it reports."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from remote_vae import RemoteVAEError, list_models
from remote_vae.errors import (
    BadRequest,
    ConnectionFailed,
    TimedOut,
    Unauthorized,
    UnknownModel,
    UnknownRoute,
    WrongMethod,
)
from remote_vae.protocol.model_description import ModelDescription

logger = logging.getLogger(__name__)
DEFAULT_URL = "http://127.0.0.1:8000"
IN_URL = "(named in the URL)"
"""Entry of the model list that takes the URL as it is, its path included: for a model that the list does not have."""

LIST_TIMEOUT_S = 2.0
"""ComfyUI fills its lists in the event loop of its own server, which stands still meanwhile."""
KEEP_S = 10.0


@dataclass(frozen=True)
class Listed:
    """What a server said of its models.

    Attributes:
        at: when, on the monotonic clock.
        server: its URL, without a model's name at the end.
        models: as it describes them.
        why_none: in brackets, as no model's name is; "" where there are some.
    """

    at: float = float("-inf")
    server: str = ""
    models: tuple[ModelDescription, ...] = ()
    why_none: str = ""

    @property
    def names(self) -> list[str]:
        return [str(model.name) for model in self.models]

    def fitting(self, channels: int, video: bool) -> list[str]:
        """Names of those that take latents of so many channels, of a video or of images."""
        return [str(model.name) for model in self.models if (model.latent_channels, model.video) == (channels, video)]


_listed: dict[str, Listed] = {}


def home() -> str:
    """The server in REMOTE_VAE_URL, without the token that may stand in it: this is what workflows are saved with."""
    parts = urlsplit(as_url(os.environ.get("REMOTE_VAE_URL") or DEFAULT_URL))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def as_url(written: str) -> str:
    """The address as people write it, `gpu-box:8000/` for one."""
    written = written.strip().rstrip("/")
    return written if "://" in written else f"http://{written}"


def token_for(url: str) -> str | None:
    """The token of REMOTE_VAE_TOKEN, or of REMOTE_VAE_URL, if `url` is on the server of REMOTE_VAE_URL.

    A workflow comes from anywhere, and its URL with it; the token goes to the user's own server and nowhere else.
    """
    if "@" in urlsplit(url).netloc or _server(url) != _server(home()):
        return None
    password = urlsplit(as_url(os.environ.get("REMOTE_VAE_URL") or "")).password
    return os.environ.get("REMOTE_VAE_TOKEN") or (unquote(password) if password else None)


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def models() -> list[str]:
    """For the list in the node: the models that the server of REMOTE_VAE_URL reports, or why there are none; then `IN_URL`.
    Asked at most every `KEEP_S` seconds: ComfyUI calls it for each node, and again at each run."""
    url = home()
    before = _listed.get(url, Listed())
    if time.monotonic() - before.at > KEEP_S:
        _listed[url] = listing(url)
        if _listed[url].why_none and _listed[url].why_none != before.why_none:
            logger.warning("Remote VAE lists no models: %s", _listed[url].why_none[1:-1])
    listed = _listed[url]
    return [*(listed.names or [listed.why_none]), IN_URL]


def endpoint(url: str, model: str) -> str:
    """The URL of the model; `url` may be that already, of this model or another. Raises BadRequest where none is named."""
    url = as_url(url)
    if not model.startswith("("):
        name = quote(model, safe="")
        trunk, _, last = url.rpartition("/")
        if last == name and urlsplit(url).path:
            return url
        known = _listed.get(url, Listed())
        return f"{known.server or url}/{name}" if last not in known.names else f"{trunk}/{name}"
    if not urlsplit(url).path:
        shown = home() if url == home() else "it"
        listed = listing(url)
        raise BadRequest(
            f"No model is chosen. Choose one in the list, or write it into the URL, as in {shown}/sd-v1; "
            f"the server has: {', '.join(listed.names) or listed.why_none[1:-1]}",
            parameter="model",
        )
    return url


def listing(url: str) -> Listed:
    """What the server says of its models; its URL may end in the name of one."""
    trunk = url.rpartition("/")[0] if urlsplit(url).path else ""
    try:
        try:
            return _told(url, url)
        except (UnknownModel, UnknownRoute, WrongMethod):
            if not trunk:
                raise
            return _told(url, trunk)
    except RemoteVAEError as error:
        return Listed(time.monotonic(), url, (), f"({_why(url, error)})")


def _told(url: str, server: str) -> Listed:
    told = list_models(server, timeout=LIST_TIMEOUT_S, retries=0, token=token_for(url))
    models = tuple(map(ModelDescription.from_plain, told))
    return Listed(time.monotonic(), server, models, "" if models else f"(the server at {_shown(server)} has no models)")


def _why(url: str, error: RemoteVAEError) -> str:
    if isinstance(error, Unauthorized):
        wrong = (
            "does not take the token of REMOTE_VAE_TOKEN"
            if token_for(url)
            else "asks for a token: set REMOTE_VAE_TOKEN"
        )
        return f"the server at {_shown(url)} {wrong}"
    if type(error) in (ConnectionFailed, TimedOut):
        return f"no server at {_shown(url)}"
    return error.message


def _shown(url: str) -> str:
    """Without a token."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
