"""`on_wait`: a client is told what its call waits for, and ends the wait within a second, at whatever point of it."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from failing_server import Z, decode, echo, in_turn, saying
from in_process import InProcess, fake_engine, pipeline_of
from limits import WAIT_S, stretched
from remote_vae import AsyncRemoteVAE, RemoteVAE, Waiting, remote_decode
from remote_vae.errors import Cancelled, ConnectionFailed
from remote_vae.protocol.model_description import ModelDescription
from remote_vae_serve.http.app import create_app
from samples import tiny_vae
from scripted_server import Exchange, ScriptedServer
from served import served
from tiled_model import A_FEW, LARGE, SMALL, TILES, TiledModel, over_http, tiled_model


class Interrupted(Exception):
    """Not one of ours."""


class Patience:
    """An `on_wait` that keeps what it was told, and raises once `is_over` says so.

    Attributes:
        ended: when it raised, on the monotonic clock.
    """

    def __init__(self, is_over: Callable[[Waiting], bool] = lambda waiting: False) -> None:
        self.told: list[Waiting] = []
        self.ended = 0.0
        self._is_over = is_over

    def __call__(self, waiting: Waiting) -> None:
        self.told.append(waiting)
        if self._is_over(waiting):
            self.ended = time.monotonic()
            raise Interrupted

    @property
    def states(self) -> list[str]:
        """In order, each once."""
        return list(dict.fromkeys(waiting.state for waiting in self.told))

    def assert_ended_in_time(self) -> None:
        assert 0 < time.monotonic() - self.ended < stretched(1)


class Silent:
    """A server that says nothing for as long as a test wants.

    Attributes:
        has_left: its client hung up.
    """

    def __init__(self, begins: bytes = b"") -> None:
        self.has_left = threading.Event()
        self._begins = begins

    def __call__(self, exchange: Exchange) -> None:
        if exchange.command == "GET":
            exchange.reply(404, {}, b"")
            return
        exchange.wfile.write(self._begins)
        exchange.connection.settimeout(WAIT_S)
        if exchange.connection.recv(1) == b"":
            self.has_left.set()
        exchange.close_connection = True


HALF = (
    b"HTTP/1.1 200 OK\r\ncontent-type: tensor/binary\r\nshape: [64]\r\ndtype: float32\r\ncontent-length: 256\r\n\r\n"
    + bytes(99)
)


@pytest.mark.parametrize("begins", [b"", HALF], ids=["before its answer", "in the middle of it"])
def test_an_interrupted_wait_ends_and_the_server_sees_its_client_hang_up(begins: bytes) -> None:
    silent, patience = Silent(begins), Patience(lambda waiting: waiting.seconds > 0.5)
    with ScriptedServer(silent) as server:
        with pytest.raises(Interrupted):
            decode(server.url, on_wait=patience)
        patience.assert_ended_in_time()
        assert silent.has_left.wait(WAIT_S)
    assert patience.states == ["receiving" if begins else "waiting"]


def test_all_requests_of_a_call_are_broken_off() -> None:
    silent = Silent()
    with ScriptedServer(silent) as server:
        with pytest.raises(Interrupted):
            remote_decode(server.url, torch.zeros(9, 4, 2, 2), on_wait=Patience(lambda waiting: waiting.seconds > 0.5))
        assert silent.has_left.wait(WAIT_S)
        assert len(server.requests) == 4, "those that had not begun never do"


def test_cancelled_is_the_error_to_raise() -> None:
    def stop(waiting: Waiting) -> None:
        raise Cancelled("by its user")

    with ScriptedServer(Silent()) as server, pytest.raises(Cancelled, match="by its user"):
        decode(server.url, on_wait=stop)


def test_the_pause_before_another_try_is_told_and_ended() -> None:
    patience = Patience(lambda waiting: waiting.seconds > 0.5)
    with in_turn(saying(503, b'{"error": "no room", "code": "overloaded"}', retry_after="60")) as server:
        with pytest.raises(Interrupted):
            decode(server.url, on_wait=patience)
        patience.assert_ended_in_time()
    last = patience.told[-1]
    assert (last.state, last.reason) == ("retrying", "no room")
    assert last.expected_s is not None
    assert last.expected_s >= 60
    assert re.fullmatch(r"retrying, \d s, in \d\d s: no room", str(last))


def test_no_local_decode_takes_the_place_of_what_was_ended() -> None:
    class Local:
        config: ClassVar[dict[str, Any]] = {}

        def decode(self, *_: object, **__: object) -> None:
            raise AssertionError

    with ScriptedServer(Silent()) as server, pytest.raises(Interrupted):
        decode(server.url, on_wait=Patience(lambda waiting: True), fallback=Local())


def test_a_local_decode_is_waited_for_as_a_servers_is() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/sd"
    made = decode(url, torch.zeros(1, 4, 4, 4), retries=0, fallback=tiny_vae("sd"), on_wait=Patience())
    assert made.shape == (1, 3, 32, 32)


def test_errors_and_results_are_what_they_are_without_it() -> None:
    patience = Patience()
    with ScriptedServer(echo) as server:
        assert torch.equal(decode(server.url, on_wait=patience), Z)
    with pytest.raises(ConnectionFailed):
        decode(server.url, on_wait=patience, retries=0)


# With a server of ours


class Sleeper(InProcess):
    """One model, which sleeps, starts and is awake as it is told; it answers all the same."""

    described = ModelDescription(name="model", state="ready")

    def describe(self, name: str) -> ModelDescription:
        return self.described


@pytest.fixture
def slow() -> Iterator[tuple[str, Sleeper]]:
    """A model whose decode takes two seconds."""
    pipeline = pipeline_of(fake_engine(decode_s=2.5))
    models = Sleeper(model=pipeline.answer)
    with served(create_app(models, 1 << 20, WAIT_S)) as url:
        yield f"{url}/model", models
    pipeline.close()


def test_starting_is_told_with_its_reason_and_what_it_took_before(slow: tuple[str, Sleeper]) -> None:
    url, models = slow
    startup = {"began": 1.0e9, "imports_s": 2.0, "weights_s": 30.0, "probe_s": 1.0}
    models.described = replace(models.described, state="starting", reason="waits for a GPU", startup=startup)
    patience = Patience()
    decode(url, Z, on_wait=patience)
    assert patience.states[:2] == ["waiting", "starting"]
    starting = next(waiting for waiting in patience.told if waiting.state == "starting")
    assert (starting.reason, starting.expected_s) == ("waits for a GPU", 36.0)
    assert str(replace(starting, seconds=12.3)) == "starting, 12 s of about 36: waits for a GPU"


def test_queued_is_told_with_how_many_come_before_and_then_decoding(slow: tuple[str, Sleeper]) -> None:
    url, _ = slow
    first = threading.Thread(target=decode, args=(url, Z))
    first.start()
    time.sleep(0.3)
    patience = Patience()
    decode(url, Z + 1, on_wait=patience)
    first.join()
    assert patience.states[:3] == ["waiting", "queued", "decoding"]
    queued = next(waiting for waiting in patience.told if waiting.state == "queued")
    assert queued.ahead == 1
    assert str(replace(queued, seconds=2)) == "queued behind 1, 2 s"


def test_an_async_call_tells_the_same(slow: tuple[str, Sleeper]) -> None:
    patience = Patience(lambda waiting: waiting.state == "decoding")

    async def ask() -> None:
        async with AsyncRemoteVAE(slow[0], on_wait=patience) as vae:
            await vae.decode(Z, output_type="pt")

    with pytest.raises(Interrupted):
        asyncio.run(ask())
    patience.assert_ended_in_time()
    assert patience.states == ["waiting", "decoding"]


def test_waking_a_model_is_told_and_ended(slow: tuple[str, Sleeper], monkeypatch: pytest.MonkeyPatch) -> None:
    url, models = slow

    async def wake(name: str) -> ModelDescription:
        await asyncio.sleep(4)
        return models.described

    monkeypatch.setattr(models, "wake", wake)
    models.described = replace(models.described, state="starting")
    patience = Patience(lambda waiting: waiting.state == "starting")
    with RemoteVAE(url, on_wait=patience) as vae, pytest.raises(Interrupted):
        vae.describe(wake=True)
    patience.assert_ended_in_time()


@pytest.fixture
def tiled(weights: Path) -> Iterator[TiledModel]:
    with tiled_model(weights) as model:
        yield model


def cancel_blocking(url: str, model: TiledModel) -> None:
    with pytest.raises(Interrupted):
        decode(url, LARGE, on_wait=Patience(lambda waiting: model.began >= 3))


def cancel_async(url: str, model: TiledModel) -> None:
    """A task that is cancelled, as `asyncio.wait_for` does it; nobody asked to be told."""

    async def ask() -> None:
        async with AsyncRemoteVAE(url) as vae:
            asked = asyncio.ensure_future(vae.decode(LARGE, output_type="pt"))
            await asyncio.to_thread(model.wait_until_in_the_middle)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked

    asyncio.run(ask())


@pytest.mark.parametrize("cancel", [cancel_blocking, cancel_async])
def test_what_was_ended_frees_the_device_at_the_next_tile(
    tiled: TiledModel, cancel: Callable[[str, TiledModel], None]
) -> None:
    alone = tiled.alone()
    with over_http(tiled) as url:
        cancel(url, tiled)
        began = tiled.began
        assert torch.equal(tiled.small(), alone)
        assert tiled.began <= began + A_FEW + TILES[SMALL.shape] < TILES[LARGE.shape]


def test_the_same_connections_serve_the_next_call() -> None:
    """What was broken off is not kept; what was not, is."""
    silent = Silent()
    with ScriptedServer(echo) as server, RemoteVAE(server.url, on_wait=Patience()) as vae:
        assert torch.equal(vae.decode(Z, output_type="pt"), Z)
        server.answer = silent
        vae._on_wait = Patience(lambda waiting: waiting.seconds > 0.3)
        with pytest.raises(Interrupted):
            vae.decode(Z, output_type="pt")
        server.answer = echo
        assert torch.equal(vae.decode(Z, output_type="pt"), Z)
        assert server.connections == 2
