"""Servers that fail in all the ways there are, one after the other, and a client that asks them."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from limits import WAIT_S
from remote_vae import errors, remote_decode
from remote_vae.errors import RemoteVAEError
from remote_vae.protocol.result import Result
from remote_vae.transports import http, transport
from scripted_server import Exchange, ScriptedServer

Z = torch.zeros(1, 4, 2, 2)
Answer = Callable[[Exchange], Any]


def echo(exchange: Exchange) -> None:
    """The latents themselves, as a tensor reply."""
    raw = exchange.decode_request().latents
    exchange.reply_result(Result("tensor/binary", raw.data, raw.dtype, raw.shape))


def saying(status: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda exchange: exchange.reply(status, {k.replace("_", "-"): v for k, v in headers.items()}, body)


def raising(error: RemoteVAEError) -> Answer:
    return lambda exchange: exchange.reply(*errors.render(error))


def cut(exchange: Exchange) -> None:
    exchange.reply(200, {"content-type": "tensor/binary", "shape": "[4]", "dtype": "float32"}, b"1234", 16)
    exchange.close_connection = True


def hang_up(exchange: Exchange) -> None:
    exchange.close_connection = True


def no_http(exchange: Exchange) -> None:
    exchange.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    exchange.close_connection = True


def in_turn(*answers: Answer) -> ScriptedServer:
    """Answers the first request with the first, and so on; all that come later with the last."""

    def answer(exchange: Exchange) -> None:
        answers[min(len(server.requests), len(answers)) - 1](exchange)

    server = ScriptedServer(answer)
    return server


def skip_sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have slept; it does not."""
    slept: list[float] = []
    for module in (transport, http):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=slept.append))
    return slept


def decode(url: str, z: Any = Z, **options: Any) -> Any:
    return remote_decode(url, z, **{"output_type": "pt", "timeout": WAIT_S} | options)
