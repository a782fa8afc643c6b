"""Work that nobody waits for any more stops at its next tile, however its client went, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch

from house import hang_up, post, until
from limits import WAIT_S
from raw_http import connect
from remote_vae.errors import DeadlineExceeded
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.request import Request
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae_serve.engine.abandonment import Abandonment
from remote_vae_serve.replica.device_job import Job
from remote_vae_serve.replica.device_worker import DeviceWorker
from tiled_model import A_FEW, LARGE, MIDDLE, SMALL, TILE_S, TILES, TiledModel, decode_request, over_http, tiled_model


@pytest.fixture
def model(weights: Path) -> Iterator[TiledModel]:
    with tiled_model(weights) as model:
        yield model


def assert_stopped(model: TiledModel, alone: torch.Tensor) -> None:
    """The device is free within a few tiles, and what it does next is exact."""
    began = model.began
    assert began < TILES[LARGE.shape] - A_FEW, "the test came too late"
    assert torch.equal(model.small(), alone)
    assert model.began <= began + A_FEW + TILES[SMALL.shape]


async def ask_and_leave(model: TiledModel, request: Request) -> None:
    """As Serve does it with a replica's method whose caller has cancelled, and the HTTP app with a client that has gone."""
    asked = asyncio.ensure_future(model.pipeline.answer(request))
    await asyncio.to_thread(model.wait_until_in_the_middle)
    asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked


def test_a_client_that_hangs_up_frees_the_device_at_the_next_tile(model: TiledModel) -> None:
    alone = model.alone()
    with over_http(model) as url:
        connection = connect(url)
        connection.sendall(post(LARGE, Output.PT))
        model.wait_until_in_the_middle()
        hang_up(connection)
        assert_stopped(model, alone)


def test_an_encode_stops_as_a_decode_does(model: TiledModel) -> None:
    alone = model.alone()
    asyncio.run(ask_and_leave(model, EncodeRequest(from_array(torch.zeros(1, 3, 128, 128)))))
    assert_stopped(model, alone)


def test_what_is_past_its_deadline_stops_and_says_so(model: TiledModel) -> None:
    alone = model.alone()
    with pytest.raises(DeadlineExceeded, match="longer than the request's client waits"):
        asyncio.run(model.pipeline.decode(decode_request(LARGE, deadline_s=6 * TILE_S)))
    assert_stopped(model, alone)


def test_nobody_behind_it_is_disturbed(model: TiledModel) -> None:
    alone = model.alone()

    async def ask() -> list[torch.Tensor]:
        leaving = asyncio.ensure_future(model.pipeline.decode(decode_request(LARGE)))
        await asyncio.to_thread(model.wait_until_in_the_middle)
        others = [asyncio.ensure_future(model.pipeline.decode(decode_request(SMALL))) for _ in range(3)]
        leaving.cancel()
        return [to_torch((await other).tensor) for other in others]

    assert all(torch.equal(made, alone) for made in asyncio.run(ask()))


def test_its_memory_is_free_without_the_garbage_collector(model: TiledModel) -> None:
    model.alone()
    gc.collect()
    gc.disable()
    try:
        asyncio.run(ask_and_leave(model, decode_request(LARGE)))
        until(lambda: not model.pipeline._worker._taken)
        assert MIDDLE <= len(model.made) < TILES[LARGE.shape]
        assert not [tile for tile in model.made if tile() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("leaving", [1, 2])
def test_a_batch_goes_on_while_one_of_it_is_waited_for(leaving: int) -> None:
    abandonment, part = Abandonment(), torch.nn.Identity()
    worker = DeviceWorker(nullcontext, unless=abandonment.unless)
    go, have_left = threading.Event(), threading.Event()
    tiles: list[int] = []

    def hold(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert go.wait(WAIT_S)
        return batch, None

    def run(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        with abandonment.at_each(part):
            for _ in range(3):
                tiles.append(len(part(batch)))
                assert have_left.wait(WAIT_S)
        return batch, None

    async def ask() -> list[object]:
        worker.submit(Job(torch.zeros(1), hold, lambda made: made))
        jobs = [Job(torch.tensor([value]), run, lambda made: made, batch_key="a", batch_limit=2) for value in (1, 2)]
        asked = [asyncio.ensure_future(worker.run(job)) for job in jobs]
        await asyncio.sleep(0)
        go.set()
        await asyncio.to_thread(until, lambda: bool(tiles))
        for one in asked[:leaving]:
            one.cancel()
        outcomes = asyncio.gather(*asked, return_exceptions=True)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        have_left.set()
        return await outcomes

    outcomes = asyncio.run(ask())
    until(lambda: not worker._taken)
    worker.close()
    assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [True, leaving == 2]
    assert tiles == ([2, 2, 2] if leaving == 1 else [2]), "as one batch, to its end or no further, and not one by one"


def test_nothing_is_asked_once_the_work_is_over() -> None:
    abandonment, part = Abandonment(), torch.nn.Identity()
    with abandonment.unless(lambda: False):
        part(torch.zeros(1))
    with abandonment.at_each(part):
        part(torch.zeros(1))
    assert not part._forward_pre_hooks
