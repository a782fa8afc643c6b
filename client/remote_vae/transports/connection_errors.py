"""Causes of a failed connection: what lies below a ConnectionError of `requests`, which says no more than that."""

from __future__ import annotations

import http.client
import os
import ssl

import requests

CA_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Environment variables by which `requests` finds the certificates to trust; the first that is set counts."""


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


def unreadable_ca_bundle(error: OSError) -> str | None:
    """The environment variable and its path, as a clause, where it leads to no certificates; None where that is not why.

    `requests` looks for the path by itself, and raises a bare OSError where there is none; on a file of something else the
    handshake fails.
    """
    variable = next((name for name in CA_BUNDLES if os.environ.get(name)), None)
    if variable is None or not (type(error) is OSError or isinstance(error, requests.exceptions.SSLError)):
        return None
    path = os.environ[variable]
    try:
        if not os.path.isdir(path):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError:  # ssl.SSLError is one
        return f"{variable} is {path!r}"
    return None


def _reasons(error: requests.ConnectionError) -> tuple[object, ...]:
    return getattr(error.args[0], "args", ()) if error.args else ()
