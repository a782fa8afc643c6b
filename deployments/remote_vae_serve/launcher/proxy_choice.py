"""Proxy choice: whether HAProxy or Serve's proxy in Python takes the requests of a server."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from typing import Literal

from remote_vae.ray_internals import FAST_VARIABLES, HAPROXY_VARIABLE, haproxy_binary
from remote_vae_serve.haproxy.command import BINARY

Proxy = Literal["auto", "haproxy", "python"]
NO_TLS = "HAProxy has no TLS of its own, and http_options has a certificate"
RUNS_S = 10.0


def why_python(has_tls: bool, address: str) -> str | None:
    """Why `auto` is Serve's own proxy; None where it is HAProxy.

    Args:
        has_tls: whether the configuration names a certificate.
        address: of the Ray; one that runs has its proxy already, and does not say which.
    """
    if address != "local":
        return f"the Ray at {address} has its own environment; say --proxy haproxy if its nodes have HAProxy's"
    if has_tls:
        return NO_TLS
    try:
        binary = os.environ.get(BINARY) or haproxy_binary()
        subprocess.run([binary, "-v"], check=True, capture_output=True, timeout=RUNS_S)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no HAProxy runs here: {error}"
    return None


def variables(haproxy: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment in which Serve has that proxy; what goes with HAProxy stays as the operator has set it."""
    if not haproxy:
        return {HAPROXY_VARIABLE: "0"}
    return {name: environment.get(name, value) for name, value in FAST_VARIABLES.items()} | {HAPROXY_VARIABLE: "1"}
