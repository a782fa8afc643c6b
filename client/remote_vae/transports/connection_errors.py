"""Causes of a failed connection: what lies below a ConnectionError of `requests`, which says no more than that."""

from __future__ import annotations

import http.client
import ssl

import requests


def is_no_http(error: requests.ConnectionError) -> bool:
    """Whether the peer sent something, and it was not HTTP. (A peer that hangs up is a RemoteDisconnected.)"""
    return any(
        isinstance(reason, http.client.HTTPException) and not isinstance(reason, http.client.RemoteDisconnected)
        for reason in _reasons(error)
    )


def is_late(error: requests.ConnectionError) -> bool:
    """Whether it was the time: what runs out while a body is sent is no Timeout to `requests`."""
    return any(isinstance(reason, TimeoutError) for reason in _reasons(error))


def is_distrust(error: BaseException) -> bool:
    """Whether it was the peer's certificate: it is of nobody this machine knows, of another host, or has expired."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, ssl.SSLCertVerificationError):
            return True
        below = below.__cause__ or below.__context__
    return False


def _reasons(error: requests.ConnectionError) -> tuple[object, ...]:
    return getattr(error.args[0], "args", ()) if error.args else ()
