"""Ports of this machine: who listens, and which are free."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from remote_vae.ray_internals import PORT_VARIABLES


def is_taken(host: str, port: int) -> bool:
    """Whether somebody answers there. Serve's proxies share a port without a word, and each would get half the requests."""
    try:
        with socket.create_connection(("127.0.0.1" if host in ("0.0.0.0", "::") else host, port), timeout=1):
            return True
    except OSError:
        return False


def haproxy_ports(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment with which a second server under HAProxy comes up beside a first: another port for each that is taken; nothing
    for those that are free, or that the environment names."""
    return {
        variable: str(_free())
        for variable, port in PORT_VARIABLES.items()
        if variable not in environment and is_taken("127.0.0.1", port)
    }


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
