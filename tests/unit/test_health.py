"""Health checks of a replica: what breaks it is found and answered with a 503; what clients send counts for nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from house import until
from remote_vae.errors import ModelFailed, Unavailable
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.engine.base import Engine
from remote_vae_serve.replica import device_worker
from remote_vae_serve.replica.device_job import Job
from remote_vae_serve.replica.device_worker import DeviceWorker
from remote_vae_serve.replica.pipeline import Pipeline
from samples import latents
from sick import BAD_REQUEST, FULL, LOST, NAN, WAIT_S, Replica, Sick, engine, job, kill, make, sick

__all__ = ["engine", "make", "sick"]  # fixtures


def test_a_replica_is_well_idle_or_busy(engine: Sick, sick: Replica) -> None:
    sick.assert_well()
    engine.entered.clear()
    engine.gate.clear()
    asking = threading.Thread(target=sick.post, args=(latents(1, 4, 8, 8),))
    asking.start()
    assert engine.entered.wait(WAIT_S)
    began = time.thread_time()  # its own work: that it waits for nothing is shown by the gate, which is shut
    for _ in range(100):
        asyncio.run(sick.vae.check_health())
    each_ms = (time.thread_time() - began) * 10
    print(f"a health check beside a decode that does not end, with an event loop made for it: {each_ms:.2f} ms")
    assert each_ms < 100
    engine.gate.set()
    asking.join(WAIT_S)
    assert engine.probed == 1  # when it was loaded


def test_a_dead_thread_leaves_nobody_waiting(engine: Sick, sick: Replica) -> None:
    worker = sick.pipeline._worker
    engine.gate.clear()
    engine.entered.clear()
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(sick.post(latents(1, 4, 8, 8))))
    first.start()
    assert engine.entered.wait(WAIT_S)
    waiting = job()
    worker.submit(waiting)
    worker._take_with = kill_here  # type: ignore[method-assign]
    engine.gate.set()
    first.join(WAIT_S)
    with pytest.raises(Unavailable, match="being replaced"):
        waiting.done.result(WAIT_S)
    until(lambda: not worker._thread.is_alive())
    assert [answer.status_code for answer in answers] == [200]
    after = job()
    worker.submit(after)
    with pytest.raises(Unavailable, match="being replaced"):
        after.done.result(0)
    assert worker.wait_s() == float("inf")
    sick.assert_to_be_replaced("thread has ended")


def kill_here(first: Job) -> None:
    raise SystemExit


def test_what_waits_for_a_thread_that_dies_is_told_so() -> None:
    held, go = threading.Event(), threading.Event()

    def hold(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        held.set()
        assert go.wait(WAIT_S)
        return batch, None

    worker = DeviceWorker(nullcontext, probe=lambda: "lost" if go.is_set() else None)
    first, failing, left, waiting = job(hold), job(fails), job(), job()
    for one in (first, failing, left, waiting):
        worker.submit(one)
    assert held.wait(WAIT_S)
    assert left.done.cancel()
    go.set()
    assert first.done.result(WAIT_S).output.shape == (1,)
    for one in (failing, waiting):
        with pytest.raises(Unavailable, match="being replaced"):
            one.done.result(WAIT_S)
    until(lambda: not worker._thread.is_alive())
    assert worker.fault == "lost"


def fails(batch: torch.Tensor) -> Any:
    raise LOST


def test_a_thread_killed_while_it_waits_is_found_dead(sick: Replica) -> None:
    worker = sick.pipeline._worker
    kill(worker._thread)
    asked = job()
    worker.submit(asked)
    with pytest.raises(Unavailable):
        asked.done.result(WAIT_S)
    until(lambda: not worker._thread.is_alive())
    sick.assert_to_be_replaced("thread has ended")


def test_a_stream_that_cannot_be_made_is_a_dead_device() -> None:
    def enter() -> Any:
        raise LOST

    worker = DeviceWorker(enter)
    until(lambda: not worker._thread.is_alive())
    assert worker.fault == "the device's thread has ended"


def test_a_lost_cuda_context_is_found_by_the_request_that_meets_it_and_nobody_gets_a_500(
    engine: Sick, sick: Replica
) -> None:
    sick.assert_well()
    engine.always = LOST
    for _ in range(3):
        sick.assert_to_be_replaced("illegal memory access")


def test_all_that_wait_for_a_lost_device_are_told_to_come_again(engine: Sick, sick: Replica) -> None:
    async def ask() -> list[Any]:
        requests = [DecodeRequest(from_array(latents(1, 4, 8, 8))) for _ in range(6)]
        asked = [asyncio.create_task(sick.vae.answer(request)) for request in requests]
        while not engine.entered.is_set():
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        engine.always = LOST
        engine.gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    engine.entered.clear()
    engine.gate.clear()
    answers = asyncio.run(ask())
    assert [type(answer) for answer in answers] == [Unavailable] * 6
    assert engine.probed == 2  # one decided for all


@pytest.mark.parametrize("broken", ["_unpackers", "_writers"])
def test_a_pool_that_is_gone_is_found(sick: Replica, broken: str) -> None:
    sick.assert_well()
    getattr(sick.pipeline, broken).shutdown()
    sick.assert_to_be_replaced("takes no work", Output.PNG)


def test_weights_that_are_spoilt_are_found_in_a_pause(
    engine: Sick, make: Callable[[Engine], Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_worker, "PAUSE_S", 0.05)
    one = make(engine)
    one.assert_well()
    engine.always = NAN
    # It rests once in each pause; this one begins behind a request that never came to the engine.
    one.pipeline._worker.submit(job())
    until(lambda: one.pipeline.fault() is not None)
    one.assert_to_be_replaced("NaN or infinity")


def test_weights_that_are_spoilt_are_found_by_a_client_who_would_be_blamed_for_them(
    engine: Sick, sick: Replica
) -> None:
    engine.always = NAN
    sick.assert_to_be_replaced("NaN or infinity")


OF_CLIENTS = {
    "makes NaN": (NAN, 400),
    "is refused": (BAD_REQUEST, 400),
    "runs out of memory": (FULL, 503),
    "runs out of memory in other words": (MemoryError(), 500),
    "crashes": (LOST, 500),
    "exits": (SystemExit(), 500),
}


@pytest.mark.parametrize("case", OF_CLIENTS)
def test_what_happens_to_one_request_is_nothing_against_the_replica(engine: Sick, sick: Replica, case: str) -> None:
    engine.of_clients, status = OF_CLIENTS[case]
    for _ in range(3):
        assert sick.post(latents(1, 4, 8, 8)).status_code == status
        sick.check()
    engine.of_clients = None
    sick.assert_well()


def test_latents_of_nan_and_shapes_of_nothing_are_nothing_against_the_replica(sick: Replica) -> None:
    assert sick.post(torch.full((1, 4, 8, 8), torch.nan)).status_code == 400
    assert sick.post(torch.zeros(1, 3, 8, 8)).status_code == 400
    sick.assert_well()


@pytest.mark.parametrize("error", [FULL, MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), BAD_REQUEST])
def test_a_probe_for_which_there_is_no_room_says_nothing(engine: Sick, sick: Replica, error: Exception) -> None:
    engine.always = error
    sick.post(latents(1, 4, 8, 8))
    sick.check()


def test_a_replica_that_is_to_be_replaced_says_so_where_it_is_asked_itself(sick: Replica) -> None:
    assert sick.vae.description().state == "ready"
    kill(sick.pipeline._worker._thread)
    sick.pipeline._worker.submit(job())
    sick.pipeline._worker._thread.join(WAIT_S)
    described = sick.vae.description()
    assert (described.state, described.reason) == ("failed", "it is being replaced: the device's thread has ended")


def test_a_replica_that_cannot_even_begin_to_load_says_why(
    make: Callable[[Engine], Replica], engine: Sick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of its constructor Serve would start it again for ever."""

    def no_threads(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as broken:
        broken.setattr("remote_vae_serve.replica.pipeline.DeviceWorker", no_threads)
        one = make(engine)
    answer = one.post(latents(1, 4, 8, 8)).json()
    assert (answer["code"], "can't start new thread" in answer["error"]) == ("model_failed", True)
    assert one.vae.description().state == "failed"


def test_a_load_whose_client_gives_up_goes_on_for_the_others(
    make: Callable[[Engine], Replica], engine: Sick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next one would load beside it, and one of two devices be forgotten."""
    one = make(engine)
    vae, pipeline, loads = one.vae, one.pipeline, 0

    def load() -> None:
        nonlocal loads
        loads += 1
        time.sleep(0.3)
        vae._pipeline, vae._failure = pipeline, None

    monkeypatch.setattr(vae, "_load", load)
    vae._pipeline, vae._failure = None, ModelFailed("no weights yet")

    async def ask() -> Pipeline:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(vae._ready(), 0.1)
        return (await asyncio.gather(vae._ready(), vae._ready()))[1]

    assert asyncio.run(ask()) is pipeline
    assert loads == 1


def test_a_failed_model_is_well(make: Callable[[Engine], Replica], engine: Sick) -> None:
    def load() -> None:
        raise ModelFailed("no weights")

    engine.load = load  # type: ignore[method-assign]
    one = make(engine)
    assert one.post(latents(1, 4, 8, 8)).json()["code"] == "model_failed"
    one.check()
