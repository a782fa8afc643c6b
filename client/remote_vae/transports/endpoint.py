"""The transport for an endpoint: a URL, a Ray Serve handle, a local fallback behind either."""

from __future__ import annotations

from typing import Any

from remote_vae.errors import BadRequest
from remote_vae.transports.handle import HandleTransport
from remote_vae.transports.http import HttpTransport
from remote_vae.transports.local import LocalTransport, WithFallback
from remote_vae.transports.retry import RetryPolicy
from remote_vae.transports.transport import Transport


def transport_to(
    endpoint: Any, retry_policy: RetryPolicy, connections: int, token: str | None, fallback: Any
) -> Transport:
    """The transport for a URL or a Ray Serve handle; a Transport is taken as it is.

    Args:
        connections: how many requests go at a time.
        token: for a URL.
        fallback: a local autoencoder of diffusers, or None.

    Raises:
        BadRequest: `endpoint` is none of these, or another argument is wrong.
    """
    if isinstance(endpoint, Transport):
        transport = endpoint
    elif isinstance(endpoint, str):
        transport = HttpTransport(endpoint, retry_policy, connections, token)
    elif hasattr(endpoint, "remote") and hasattr(endpoint, "options"):
        transport = HandleTransport(endpoint, retry_policy)
    else:
        raise BadRequest(
            f"endpoint is a {type(endpoint).__name__}; expected a URL or a Ray Serve deployment handle",
            parameter="endpoint",
        )
    return transport if fallback is None else WithFallback(transport, LocalTransport(fallback))
