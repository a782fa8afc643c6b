"""Guests with bad manners: each costs its own request and no more, and leaves nothing behind."""

from __future__ import annotations

import http.client
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from diffusers import AutoencoderKL

from house import DOORS, WAIT_S, House, fields, filled, gated, hang_up, house, post, send, temporary, until
from in_process import diffusers_engine, fake_engine
from limits import stretched
from raw_http import connect, speak
from remote_vae.protocol.output import Output
from remote_vae_serve.http import responses
from samples import KL, latents

__all__ = ["temporary"]  # a fixture

LARGE = latents(1, 4, 256, 256)  # 48 MiB as a tensor: more than all the buffers between us and a reader
LARGE_REPLY = 3 * 2048 * 2048 * 4
GENEROUS_S = 0.5


@pytest.mark.parametrize("door", DOORS)
def test_who_hangs_up_in_the_middle_of_the_body_is_never_decoded(temporary: Path, door: str) -> None:
    engine = gated()
    with house(engine, temporary, door) as there:
        engine.decoded.clear()
        for share in (0, 1, 100_000):
            connection = send(there, post(latents(1, 4, 128, 128), path=there.path)[: share - 262_144])
            time.sleep(0.05)
            hang_up(connection)
        there.assert_tidy()
    assert engine.decoded == [[0.0]]  # the request that came after


@pytest.mark.parametrize("door", DOORS)
def test_who_hangs_up_while_the_device_works_costs_that_decode_only(temporary: Path, door: str) -> None:
    engine = gated()
    with house(engine, temporary, door) as there:
        engine.shut()
        connection = send(there, post(filled(1), path=there.path))
        assert engine.entered.wait(WAIT_S)
        hang_up(connection)
        time.sleep(0.1)
        engine.open.set()
        there.assert_tidy()
    assert engine.decoded == [[1.0], [0.0]]


@pytest.mark.parametrize("door", DOORS)
def test_who_hangs_up_in_the_queue_is_never_decoded(temporary: Path, door: str) -> None:
    engine = gated()
    with house(engine, temporary, door) as there:
        engine.shut()
        first = send(there, post(filled(1), path=there.path))
        assert engine.entered.wait(WAIT_S)
        leaver = send(there, post(filled(2), path=there.path))
        until(lambda: there.waiting == 1)
        stayer = send(there, post(filled(3), path=there.path))
        until(lambda: there.waiting == 2)
        hang_up(leaver)
        until(there.futures[-2].cancelled)
        engine.open.set()
        assert [speak(connection).status for connection in (first, stayer)] == [200, 200]
        there.assert_tidy()
    assert engine.decoded == [[1.0], [3.0], [0.0]]


def read_all(connection: socket.socket) -> tuple[int, int]:
    """Status and bytes of a large reply."""
    with connection:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, len(answer.read())


class Slices:
    """How many slices of streamed replies were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        self._pieces = responses._pieces
        monkeypatch.setattr(responses, "_pieces", self._counted)

    async def _counted(self, body: memoryview, has_connection: bool) -> AsyncIterator[bytes | memoryview]:
        async for one in self._pieces(body, has_connection):
            self.made += 1
            yield one


@pytest.mark.parametrize("door", DOORS)
def test_who_hangs_up_in_the_middle_of_a_large_reply_gets_no_more_of_it_made(
    temporary: Path, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = Slices(monkeypatch)
    with house(fake_engine(), temporary, door) as there:
        connection = send(there, post(LARGE, Output.PT, path=there.path))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
        hang_up(connection)
        there.assert_tidy()
        assert 0 < slices.made < LARGE_REPLY // responses.SLICE
        assert read_all(send(there, post(LARGE, Output.PT, path=there.path))) == (200, LARGE_REPLY)


@pytest.mark.parametrize("door", DOORS)
def test_a_reader_that_stalls_stalls_the_reply_and_nobody_else(
    temporary: Path, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = Slices(monkeypatch)
    with house(fake_engine(), temporary, door) as there:
        tracemalloc.start()
        connection = connect(there.url, WAIT_S)
        connection.sendall(post(LARGE, Output.PT, path=there.path))
        until(lambda: slices.made > 0)
        time.sleep(0.5)
        made, buffered = slices.made, tracemalloc.get_traced_memory()[0]  # the reply itself is torch's, and not traced
        tracemalloc.stop()
        assert made < LARGE_REPLY // responses.SLICE // 2
        assert buffered < 8 * responses.SLICE
        assert there.serve().status == 200
        time.sleep(0.2)
        assert slices.made == made
        assert read_all(connection) == (200, LARGE_REPLY)  # it reads on, and has all of it
        there.assert_tidy()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("told", "deadline_s"), [({"x_vae_deadline_ms": "700"}, WAIT_S), ({}, 0.7)])
def test_an_upload_slower_than_the_deadline_is_a_504_and_its_memory_comes_back(
    temporary: Path, door: str, told: dict[str, str], deadline_s: float
) -> None:
    with house(fake_engine(), temporary, door, deadline_s=deadline_s) as there:
        request = post(latents(1, 4, 1024, 2048), path=there.path, **told)
        request = request[: len(request) - 2**25 + 2**22]
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        connection = send(there, request)  # 4 MiB of the 32 that it announces; then it takes its time
        until(lambda: tracemalloc.get_traced_memory()[0] > before + 2**22)
        with connection.dup() as open_still:
            answer = speak(connection)
            assert (answer.status, fields(answer)["code"]) == (504, "deadline_exceeded")
            assert ("700 ms" if told else "0.7 s") in fields(answer)["error"]
            until(lambda: tracemalloc.get_traced_memory()[0] < before + 2**20)
            open_still.sendall(bytes(2**16))  # what still comes is dropped
        tracemalloc.stop()
        there.assert_tidy()


def p99_of_health(there: House, busy: threading.Thread) -> float:
    """Seconds that a `GET /health` takes while the thread lives."""
    parts = urlsplit(there.url)
    assert parts.hostname is not None
    taken = []
    while busy.is_alive():
        began = time.perf_counter()
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=WAIT_S)
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        connection.close()
        taken.append(time.perf_counter() - began)
        time.sleep(0.005)
    assert len(taken) >= 10
    return sorted(taken)[int(0.99 * len(taken))]


def in_thread(there: House, times: int, **request: Any) -> tuple[threading.Thread, list[int]]:
    statuses: list[int] = []
    busy = threading.Thread(target=lambda: statuses.extend(there.serve(**request).status for _ in range(times)))
    busy.start()
    return busy, statuses


@pytest.mark.parametrize("door", DOORS)
def test_health_is_answered_while_the_device_is_busy(temporary: Path, door: str) -> None:
    with house(fake_engine(decode_s=1.0), temporary, door) as there:
        busy, statuses = in_thread(there, 1)
        p99 = p99_of_health(there, busy)
    print(f"GET /health beside a decode of 1 s, {door}: p99 {1000 * p99:.1f} ms")
    assert statuses == [200]
    assert p99 < stretched(GENEROUS_S)


def test_health_is_answered_beside_a_real_decode(temporary: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(**KL | {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}, latent_channels=4)
    model.save_pretrained(tmp_path / "vae")
    with house(diffusers_engine(tmp_path / "vae"), temporary) as there:
        for output in (Output.JPEG, Output.PNG, Output.PT):
            began = time.perf_counter()
            busy, statuses = in_thread(there, 2, z=latents(1, 4, 40, 40), output=output)
            p99 = p99_of_health(there, busy)
            each = (time.perf_counter() - began) / 2
            print(f"GET /health beside real decodes of {each:.2f} s to {output.value}: p99 {1000 * p99:.1f} ms")
            assert statuses == [200] * 2
            assert p99 < stretched(GENEROUS_S)
