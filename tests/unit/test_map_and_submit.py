"""Many calls of one client: `map` and `submit`, in order and within bounds."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from failing_server import Z, echo
from limits import WAIT_S
from remote_vae import AsyncRemoteVAE, RemoteVAE, errors
from remote_vae.errors import BadRequest
from remote_vae.protocol.tensors import to_torch
from scripted_server import Exchange, ScriptedServer


class Crowd:
    """Answers in the reverse of the order asked, and counts how many wait at once; the latents name the request.

    Nobody is answered before `expected` of them wait, so that a slow machine does not look like a bound.
    """

    def __init__(self, total: int, expected: int) -> None:
        self._total, self._expected = total, expected
        self._lock = threading.Lock()
        self._assembled = threading.Event()
        self.now = self.most = 0
        self.started: list[int] = []

    def __call__(self, exchange: Exchange) -> None:
        number = int(to_torch(exchange.decode_request().latents).flatten()[0])
        with self._lock:
            self.started.append(number)
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now >= self._expected:
                self._assembled.set()
        self._assembled.wait(WAIT_S)
        time.sleep(0.005 * (self._total - number))
        with self._lock:
            self.now -= 1
        echo(exchange)


def first_of(tensor: Any) -> int:
    return int(tensor.flatten()[0])


def drain(vae: RemoteVAE, tensors: Any) -> list[Any]:
    with vae:
        return list(vae.map(tensors, output_type="pt"))


def drain_async(vae: AsyncRemoteVAE, tensors: Any) -> list[Any]:
    async def run() -> list[Any]:
        async with vae:
            return [decoded async for decoded in vae.map(tensors, output_type="pt")]

    return asyncio.run(run())


BOTH = pytest.mark.parametrize(("client", "drained"), [(RemoteVAE, drain), (AsyncRemoteVAE, drain_async)])


@BOTH
@pytest.mark.parametrize("workers", [1, 3])
def test_map_keeps_the_order_and_no_more_than_workers_in_flight(client: Any, drained: Any, workers: int) -> None:
    crowd = Crowd(8, workers)
    with ScriptedServer(crowd) as server:
        decoded = drained(client(server.url, workers=workers), [Z + number for number in range(8)])
    assert [first_of(pixels) for pixels in decoded] == list(range(8))
    assert crowd.most == workers


@BOTH
def test_map_takes_the_next_latents_only_when_there_is_room(client: Any, drained: Any) -> None:
    """Latents are large: a generator that makes millions of them must not be run dry at once."""
    taken: list[int] = []
    lead: list[int] = []

    def one_by_one() -> Any:
        for number in range(6):
            taken.append(number)
            yield Z + number

    def answer(exchange: Exchange) -> None:
        lead.append(len(taken) - first_of(to_torch(exchange.decode_request().latents)))
        echo(exchange)

    with ScriptedServer(answer) as server:
        drained(client(server.url, workers=2), one_by_one())
    assert max(lead) <= 2 + 1  # two in flight and one in hand


@BOTH
def test_an_error_in_map_comes_out_at_its_place(client: Any, drained: Any) -> None:
    def refuse_the_third(exchange: Exchange) -> None:
        refused = first_of(to_torch(exchange.decode_request().latents)) == 2
        exchange.reply(*errors.render(BadRequest("Not this one."))) if refused else echo(exchange)

    seen = []

    def remember() -> Any:
        for number in range(5):
            seen.append(number)
            yield Z + number

    with ScriptedServer(refuse_the_third) as server, pytest.raises(BadRequest, match="Not this one"):
        drained(client(server.url, workers=2), remember())
    assert seen[:3] == [0, 1, 2]


def test_a_map_that_is_left_starts_nothing_more() -> None:
    crowd = Crowd(3, 2)
    with ScriptedServer(crowd) as server, RemoteVAE(server.url, workers=2) as vae:
        decoded = vae.map((Z for _ in range(100)), output_type="pt")
        next(decoded)
        decoded.close()
        time.sleep(0.1)
        assert crowd.started == [0, 0]


def test_submit_gives_a_future_of_the_result_or_of_the_error() -> None:
    with ScriptedServer(echo) as server, RemoteVAE(server.url) as vae:
        good = vae.submit(Z + 5, output_type="pt")
        bad = vae.submit(Z, output_type="gif")
        assert isinstance(good, Future)
        assert torch.equal(good.result(WAIT_S), Z + 5)
        assert isinstance(bad.exception(WAIT_S), BadRequest)


def test_async_submit_gives_a_task_and_leaves_the_loop_free() -> None:
    release = threading.Event()

    def wait_then_echo(exchange: Exchange) -> None:
        release.wait(WAIT_S)
        echo(exchange)

    async def run(url: str) -> Any:
        async with AsyncRemoteVAE(url) as vae:
            task = await vae.submit(Z + 5, output_type="pt")
            await asyncio.sleep(0.05)
            assert not task.done()
            release.set()
            return await task

    with ScriptedServer(wait_then_echo) as server:
        assert torch.equal(asyncio.run(run(server.url)), Z + 5)
