"""Toy apps in the proxy's layers, driven message by message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from remote_vae_serve.middleware import settings
from remote_vae_serve.proxy import middlewares

LIMIT = 1000
TOKENS = "first,second"


@pytest.fixture
def wrap(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ASGIApp]:
    """An app in the layers that the environment asks for, put together as Serve does."""

    def wrapped(app: ASGIApp, tokens: str | None = None) -> ASGIApp:
        monkeypatch.setenv(settings.MAX_BODY_MIB, str(LIMIT / 2**20))
        if tokens is None:
            monkeypatch.delenv(settings.TOKENS, raising=False)
        else:
            monkeypatch.setenv(settings.TOKENS, tokens)
        for layer in middlewares():
            app = layer.cls(app, *layer.args, **layer.kwargs)
        return app

    return wrapped


class Echo:
    """Reads the whole body and answers its length; remembers what it was given."""

    def __init__(self) -> None:
        self.calls = 0
        self.read = 0
        self.disconnected = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected = True
                return
            self.read += len(message["body"])
            more = message.get("more_body", False)
        await Response(str(self.read), media_type="application/json")(scope, receive, send)


def exchange(
    app: ASGIApp, body: Iterable[bytes], headers: dict[str, str], idle: bool = False
) -> tuple[list[Message], int]:
    """POST the pieces as a server would hand them over; what was sent back, and how many pieces were taken.

    With `idle`, nothing comes after the pieces, and the connection stays.
    """
    sent: list[Message] = []
    pieces = iter(body)
    taken = 0

    async def receive() -> Message:
        nonlocal taken
        piece = next(pieces, None)
        if piece is None:
            if idle:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": b"", "more_body": False}
        taken += 1
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/sd", "root_path": "", "query_string": b"", "headers": raw}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent, taken


def error_of(sent: list[Message]) -> tuple[int, dict[str, Any]]:
    """Status and fields of the contract's JSON."""
    headers = dict(sent[0]["headers"])
    body = b"".join(message["body"] for message in sent[1:])
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == len(body)
    fields = dict(json.loads(body))
    assert fields["error"]
    assert fields["request_id"].encode() == headers[b"x-request-id"]
    return sent[0]["status"], fields


def assert_json_error(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    fields = dict(answer.json())
    assert (answer.status_code, fields["code"]) == (status, code)
    assert fields["error"]
    assert fields["request_id"] == answer.headers["x-request-id"]
    return fields
