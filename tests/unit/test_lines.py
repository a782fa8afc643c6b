"""Narrow wires, slow lines, small memories, and loops that must not stand still."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
import threading
import time
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from failing_server import Z, cut, decode, echo, in_turn, saying, skip_sleeps
from limits import stretched
from remote_vae import AsyncRemoteVAE, errors, remote_encode
from remote_vae.calls.decode_call import DecodeCall
from remote_vae.calls.encode_call import EncodeCall
from remote_vae.errors import BadRequest, BrokenReply, TimedOut
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import host_bytes
from samples import latents
from scripted_server import Exchange, ScriptedServer

MIB = 2**20


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return skip_sleeps(monkeypatch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_wire_dtype_is_what_travels(dtype: str) -> None:
    z = latents(1, 4, 2, 2)
    with ScriptedServer(echo) as server:
        decoded = decode(server.url, z, wire_dtype=dtype)
    assert f"dtype={dtype}&" in server.requests[0]
    assert torch.equal(decoded, z.to(getattr(torch, dtype)))


def test_without_wire_dtype_nothing_is_cast() -> None:
    with ScriptedServer(echo) as server:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert decode(server.url, Z.to(dtype)).dtype == dtype


def test_wire_dtype_is_for_numpy_and_for_dtypes_that_do_not_travel_too() -> None:
    z = latents(1, 4, 2, 2).double()
    with ScriptedServer(echo) as server:
        assert np.array_equal(decode(server.url, z.numpy(), wire_dtype="float16"), z.half().numpy())
        assert torch.equal(decode(server.url, z, wire_dtype="float32"), z.float())
    with pytest.raises(BadRequest, match="numpy has no bfloat16"):
        decode(server.url, z.numpy(), wire_dtype="bfloat16")
    with pytest.raises(BadRequest, match="float64 does not travel"):
        decode(server.url, z)


@pytest.mark.parametrize("make", [lambda z: z, lambda z: z.numpy()], ids=["torch", "numpy"])
@pytest.mark.parametrize("value", [1e5, -65520.0])
def test_a_value_that_overflows_on_the_wire_is_refused_before_it_is_sent(make: Any, value: float) -> None:
    with ScriptedServer(echo) as server:
        with pytest.raises(BadRequest, match="beyond the range") as caught:
            decode(server.url, make(Z + value), wire_dtype="float16")
        assert (caught.value.parameter, server.connections) == ("wire_dtype", 0)
        with pytest.raises(BadRequest, match="beyond the range"):
            remote_encode(server.url, make(torch.full((1, 3, 8, 8), value)), wire_dtype="float16")


def test_infinity_and_nan_are_not_the_wires_fault() -> None:
    z = torch.tensor([[float("inf"), float("nan"), -float("inf"), 65504.0]]).view(1, 4, 1, 1)
    with ScriptedServer(echo) as server:
        assert torch.equal(decode(server.url, z, wire_dtype="float16").nan_to_num(7), z.half().nan_to_num(7))


def test_a_wire_dtype_of_no_latents_is_refused() -> None:
    for dtype in ("uint8", "float8_e4m3fn", "float64", ""):
        with pytest.raises(BadRequest, match="wire_dtype is") as caught:
            decode("http://127.0.0.1:1/model", wire_dtype=dtype)
        assert caught.value.parameter == "wire_dtype"


def test_pictures_are_never_cast() -> None:
    def encoded(exchange: Exchange) -> None:
        exchange.reply_result(Result("tensor/binary", np.zeros(4, np.uint8), "float32", (1, 1, 1, 1)))

    with ScriptedServer(encoded) as server:
        remote_encode(server.url, np.zeros((1, 8, 8, 3), np.uint8), wire_dtype="float16")
        remote_encode(server.url, Image.new("RGB", (8, 8)), wire_dtype="float16")
        remote_encode(server.url, np.zeros((1, 3, 8, 8), np.float32), wire_dtype="float16")
    assert ["dtype=uint8" in line for line in server.requests] == [True, True, False]
    assert "dtype=float16" in server.requests[2]


# Memory and slow lines


class Sink:
    """A server that keeps nothing: reads a body into one small buffer, a while after each read, and answers from memory that
    was there before."""

    def __init__(self, reply: bytes, headers: bytes, pause_s: float = 0.0, window: int | None = None) -> None:
        self._reply, self._headers, self._pause_s = reply, headers, pause_s
        self._listener = socket.socket()
        if window is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.received = 0
        self._left = False
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/model"

    def __enter__(self) -> Sink:
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        buffer = bytearray(2**17)
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            head, _, rest = head.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            self.received = len(rest)
            try:
                while self.received < length and not self._left and (count := connection.recv_into(buffer)):
                    self.received += count
                    time.sleep(self._pause_s)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n" % len(self._reply) + self._headers)
                connection.sendall(b"\r\n")
                connection.sendall(self._reply)
                connection.recv(1)
            except OSError:  # the client gave up
                return


def test_a_reply_of_64_mib_is_held_once_and_a_body_of_64_mib_not_at_all() -> None:
    z = np.ones((1, 4, 2048, 2048), np.float32)
    assert z.nbytes == 64 * MIB
    headers = b"content-type: tensor/binary\r\nshape: [1, 4, 2048, 2048]\r\ndtype: float32\r\n"
    for body, reply, most in ((z, b"1234", 6 * MIB), (Z.numpy(), z.tobytes(), 70 * MIB)):
        ends = headers if len(reply) > 4 else headers.replace(b"[1, 4, 2048, 2048]", b"[1]")
        with Sink(reply, ends) as sink:
            gc.collect()
            tracemalloc.start()
            try:
                decoded = decode(sink.url, body, timeout=60)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert sink.received == body.nbytes
        assert decoded.nbytes == len(reply)
        assert peak < most, f"{peak / MIB:.1f} MiB at the peak"


def test_a_reply_that_announces_what_it_does_not_send_costs_nothing() -> None:
    def announce(exchange: Exchange) -> None:
        exchange.reply(200, {"content-type": "tensor/binary"}, b"", length=10**15)
        exchange.close_connection = True

    with ScriptedServer(announce) as server:
        tracemalloc.start()
        try:
            with pytest.raises(errors.ConnectionLost):
                decode(server.url, retries=0)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 4 * MIB


@pytest.mark.parametrize("length", ["1" * 5000, "9" * 19])
def test_a_length_of_no_sense_is_the_servers_fault(length: str) -> None:
    def announce(exchange: Exchange) -> None:
        exchange.send_response(200)
        exchange.send_header("content-length", length)
        exchange.end_headers()
        exchange.close_connection = True

    with ScriptedServer(announce) as server, pytest.raises(errors.BrokenReply):
        decode(server.url, retries=0)


def test_a_slow_line_takes_longer_to_send_than_to_connect() -> None:
    """A socket's time-out holds for all that one call of `send` sends, and that of the connection is the one in force."""
    z = np.zeros((4, 4, 512, 512), np.float32)
    headers = b"content-type: tensor/binary\r\nshape: [1]\r\ndtype: float32\r\n"
    with Sink(b"1234", headers, pause_s=0.02, window=2**16) as sink:
        begun = time.monotonic()
        decode(sink.url, z, timeout=(2, 60), retries=0)
        assert time.monotonic() - begun > 2
    assert sink.received == z.nbytes


def test_a_line_too_slow_for_the_deadline_is_a_time_out_and_is_not_tried_again(slept: list[float]) -> None:
    z = np.zeros((1, 4, 1024, 1024), np.float32)
    with Sink(b"", b"", pause_s=0.1, window=2**16) as sink:
        begun = time.monotonic()
        with pytest.raises(TimedOut):
            decode(sink.url, z, timeout=(5, 30), deadline=0.5)
        assert time.monotonic() - begun < stretched(5)
    assert slept == []


# Async


def test_the_loop_runs_on_while_a_client_waits_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_vae.transports.retry.FIRST_PAUSE_S", 0.15)
    ticks = []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def run(url: str) -> Any:
        ticking = asyncio.create_task(tick())
        async with AsyncRemoteVAE(url) as vae:
            decoded = await vae.decode(Z + 2, output_type="pt")
            ticking.cancel()
            assert (await vae.describe())["state"] == "cold"
        return decoded

    def describe(exchange: Exchange) -> None:
        exchange.reply(200, {}, b'{"state": "cold"}')

    def slow_echo(exchange: Exchange) -> None:
        time.sleep(0.1)
        echo(exchange)

    with in_turn(saying(503), saying(429), cut, slow_echo, describe) as server:
        begun = time.monotonic()
        assert torch.equal(asyncio.run(run(server.url)), Z + 2)
    assert time.monotonic() - begun > 0.15 * 7
    assert len(ticks) > 20


def test_what_takes_time_is_not_done_in_the_loop_and_what_does_not_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casting latents, stacking pictures and reading a large PNG take as long as an answer does."""
    threads: dict[str, int] = {}

    def noting(name: str, method: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            threads[name] = threading.get_ident()
            return method(*arguments)

        return noted

    for call in (DecodeCall, EncodeCall):
        for name in ("requests", "answer"):
            patched = noting(f"{call.__name__}.{name}", getattr(call, name))
            monkeypatch.setattr(call, name, patched)

    def answer(exchange: Exchange) -> None:
        values = replies.pop(0)
        exchange.reply_result(Result("tensor/binary", np.zeros(4 * values, np.uint8), "float32", (1, 1, 1, values)))

    async def run(url: str) -> tuple[int, Mapping[str, int], Mapping[str, int]]:
        async with AsyncRemoteVAE(url) as vae:
            await vae.decode(torch.zeros(1, 4, 256, 256), output_type="pt")
            await vae.encode(Image.new("RGB", (8, 8)))
            slow = dict(threads)
            await vae.decode(Z, output_type="pt")
            await vae.encode(torch.zeros(1, 3, 8, 8))
        return threading.get_ident(), slow, threads

    replies = [2**18, 2**18, 1, 1]
    with ScriptedServer(answer) as server:
        loops, slow, quick = asyncio.run(run(server.url))
    assert len(slow) == len(quick) == 4
    assert loops not in slow.values()
    assert set(quick.values()) == {loops}


def test_a_tensor_that_is_not_in_this_processs_memory_is_fetched_in_a_thread() -> None:
    assert host_bytes(torch.zeros(2, 3, dtype=torch.bfloat16)) == host_bytes(np.zeros((2, 3), np.float16)) == 12
    assert host_bytes(torch.zeros(2, 3, device="meta")) == host_bytes([Image.new("RGB", (8, 8))]) == math.inf


def test_a_small_reply_of_another_kind_is_said_so_in_async_code_too() -> None:
    def answer(exchange: Exchange) -> None:
        exchange.reply_result(Result("tensor/binary", np.zeros(4, np.uint8), "float32", (1, 1, 1, 1)))

    async def run(url: str) -> None:
        async with AsyncRemoteVAE(url, retries=0) as vae:
            await vae.decode(Z, output_type="mp4")

    with ScriptedServer(answer) as server, pytest.raises(BrokenReply, match="not a video"):
        asyncio.run(run(server.url))
