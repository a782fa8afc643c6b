"""Client identity: whose request it is, by which the shares of a queue are told apart. Never written anywhere.

By token, where tokens are asked for; else by the address of the peer, or, where that is a proxy that is trusted, by the
X-Forwarded-For that it has added to. Anybody can write that header, so that nobody else is believed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.requests import Request

CLIENT = "remote_vae.client"
"""Key of the ASGI scope under which the middleware that checks tokens leaves who has shown one."""
UNKNOWN = "unknown"
LOOPBACK = ("127.0.0.0/8", "::1/128")


class ClientIdentity:
    """Tells clients apart.

    Args:
        trusted_proxies: addresses or networks (`10.0.0.0/8`) of proxies whose X-Forwarded-For is believed.
    """

    def __init__(self, trusted_proxies: Sequence[str]) -> None:
        self._trusted = [ipaddress.ip_network(network, strict=False) for network in trusted_proxies]

    def of(self, request: Request) -> str:
        """A name for who sent it, the same for each of his requests."""
        if known := request.scope.get(CLIENT):
            return str(known)
        address = request.client.host if request.client else UNKNOWN
        if not self._is_trusted(address):
            return address
        forwarded = [part.strip() for line in request.headers.getlist("x-forwarded-for") for part in line.split(",")]
        # Each proxy adds by whom it was asked: the last that is no proxy of ours is the first to be believed.
        return next((part[:64] for part in reversed(forwarded) if part and not self._is_trusted(part)), address)

    def _is_trusted(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        return any(parsed in network for network in self._trusted)
