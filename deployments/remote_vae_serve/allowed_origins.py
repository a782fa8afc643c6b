"""Allowed origins of CORS: which pages, by `scheme://host[:port]`, may use a server from a browser.

Imports no more than Python's own: HAProxy is started by way of it (`remote_vae_serve.haproxy`), and waits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ANY = "*"
METHODS = ("GET", "HEAD", "POST")
"""What pages may send."""
NULL = "null"
"""What a browser says for a page without an origin of its own: a file, a sandboxed frame, a redirect between origins."""
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(?:\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
SHOWN = 100
"""So much of an origin is said back."""


def read_origins(written: Iterable[str]) -> tuple[str, ...]:
    """The origins as browsers send them: lower case, without the port that goes without saying.

    Raises:
        ValueError: with a sentence that says what was expected.
    """
    origins = tuple(origin.strip().lower() for origin in written)
    for origin in origins:
        if origin not in (ANY, NULL) and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"allow_origins has {origin[:SHOWN]!r}; expected origins of pages as browsers send them, such as "
                "https://page.example or http://localhost:3000, without a path, or * for all"
            )
    if ANY in origins and len(origins) > 1:
        raise ValueError(
            "allow_origins has * among others; expected * alone, which is all of them, or a list without it"
        )
    return tuple(dict.fromkeys(map(_without_default_port, origins)))


def is_own(origin: str, host: str) -> bool:
    """Whether an Origin is that of the server itself, by the Host that the same request asks for.

    The scheme is not compared: behind a proxy that ends TLS a page of https is ours as well.
    """
    scheme, _, authority = _without_default_port(origin.lower()).partition("://")
    return authority != "" and authority == host.lower().removesuffix(_DEFAULT_PORTS.get(scheme, ""))


def _without_default_port(origin: str) -> str:
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], ""))
