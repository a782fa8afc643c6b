"""Whose request it is: by token, by address, by what a trusted proxy says, and by nothing that a client can write itself."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import Request

from remote_vae_serve.http.client_identity import CLIENT, LOOPBACK, ClientIdentity
from remote_vae_serve.middleware.settings import Settings
from remote_vae_serve.middleware.tokens import Tokens


def request(peer: str | None, *forwarded: str, **scope: Any) -> Request:
    headers = [(b"x-forwarded-for", line.encode()) for line in forwarded]
    client = None if peer is None else (peer, 1234)
    return Request({"type": "http", "headers": headers, "client": client, **scope})


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("10.1.2.3", (), "10.1.2.3"),
        ("10.1.2.3", ("6.6.6.6",), "10.1.2.3"),  # no proxy of ours: anybody can write that
        ("127.0.0.1", ("203.0.113.7",), "203.0.113.7"),
        ("127.0.0.1", ("6.6.6.6, 203.0.113.7",), "203.0.113.7"),
        ("127.0.0.1", ("6.6.6.6", "203.0.113.7"), "203.0.113.7"),  # HAProxy adds a line of its own
        ("192.168.0.9", ("6.6.6.6, 203.0.113.7, 192.168.7.7",), "203.0.113.7"),  # two proxies, both ours
        ("::1", ("2001:db8::1",), "2001:db8::1"),
        ("127.0.0.1", (), "127.0.0.1"),
        ("127.0.0.1", ("127.0.0.1, ,",), "127.0.0.1"),
        ("127.0.0.1", ("unknown",), "unknown"),
        ("127.0.0.1", ("x" * 5000,), "x" * 64),
        ("fe80::1%eth0", ("6.6.6.6",), "fe80::1%eth0"),
        (None, ("6.6.6.6",), "unknown"),
        ("", (), ""),
    ],
)
def test_the_last_address_that_is_no_proxy_of_ours(peer: str | None, forwarded: tuple[str, ...], expected: str) -> None:
    identity = ClientIdentity([*LOOPBACK, "192.168.0.0/16"])
    assert identity.of(request(peer, *forwarded)) == expected


async def seen_behind_tokens(header: str) -> str | None:
    """What the app sees of who sent a request."""
    seen: list[str | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get(CLIENT))

    async def nothing(*_: Any) -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/m", "headers": [(b"authorization", header.encode())]}
    await Tokens(app, Settings(max_body=1, tokens=("first", "second")))(scope, nothing, nothing)
    return seen[0] if seen else None


async def _of_both() -> list[str | None]:
    return [await seen_behind_tokens(f"Bearer {token}") for token in ("first", "first", "second", "wrong")]


def test_a_token_tells_its_holder_apart_and_cannot_be_read_from_it() -> None:
    import asyncio

    first, again, second, wrong = asyncio.run(_of_both())
    assert first == again != second
    assert wrong is None
    assert first is not None
    assert "first" not in first
    assert ClientIdentity(LOOPBACK).of(request("10.0.0.1", **{CLIENT: first})) == first
