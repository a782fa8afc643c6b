"""A deadline is one for the whole call, the server hears of it, and nobody decodes for a client that has given up."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import requests
import torch
from PIL import Image

from failing_server import Z, decode, echo, in_turn, saying
from in_process import InProcess, fake_engine, pipeline_of
from limits import WAIT_S
from remote_vae import AsyncRemoteVAE, remote_decode
from remote_vae.errors import DeadlineExceeded, TimedOut, Unavailable
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.engine.base import Decoded
from remote_vae_serve.engine.fake import FakeEngine
from remote_vae_serve.engine.tiling import UNTILED, TilingPlan
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints
from remote_vae_serve.http.app import create_app
from scripted_server import Exchange, ScriptedServer
from served import served


def deadlines(server: ScriptedServer) -> list[int]:
    return [int(headers["x-vae-deadline-ms"]) for headers in server.headers]


def test_each_try_tells_the_server_what_is_left_and_never_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_vae.transports.retry.FIRST_PAUSE_S", 0.08)
    with in_turn(saying(503)) as server, pytest.raises(Unavailable):
        decode(server.url, deadline=4, timeout=60, retries=3)
    told = deadlines(server)
    assert len(told) == 4
    assert 3000 < told[0] <= 4000
    for number in range(1, 4):  # less by the last try and the pause after it, to the millisecond that is cut off
        assert told[number] <= told[number - 1] - 80 * 2 ** (number - 1) + 1


@pytest.mark.parametrize(
    ("timeout", "deadline", "told"),
    [((10, 300), None, 310_000), (5, 60, 5_000), (None, None, None), ((None, 5), 7, 7000)],
)
def test_the_server_is_told_of_the_shorter_of_both(timeout: Any, deadline: Any, told: int | None) -> None:
    with ScriptedServer(echo) as server:
        decode(server.url, timeout=timeout, deadline=deadline)
    said = server.headers[0].get("x-vae-deadline-ms")
    assert said is None if told is None else told - 1000 < int(str(said)) <= told


def test_a_deadline_ends_the_call_whatever_the_time_out() -> None:
    release = threading.Event()
    with ScriptedServer(lambda exchange: release.wait(WAIT_S)) as server:
        with pytest.raises(TimedOut, match=r"deadline 0\.2 s"):
            decode(server.url, deadline=0.2, timeout=None)
        release.set()


def answers_in(seconds: float) -> ScriptedServer:
    def answer(exchange: Exchange) -> None:
        time.sleep(seconds)
        picture = io.BytesIO()
        Image.new("RGB", (1, 1)).save(picture, "PNG")
        exchange.reply(200, {"content-type": "image/png"}, picture.getvalue())

    return ScriptedServer(answer)


async def together(url: str, count: int, **options: Any) -> list[Any]:
    async with AsyncRemoteVAE(url, **options) as vae:
        return await asyncio.gather(*(vae.decode(Z) for _ in range(count)), return_exceptions=True)


def test_a_call_that_waited_for_a_thread_tells_the_server_what_is_left() -> None:
    """Over HTTP an async call needs one of a few threads; its deadline runs while it waits for it."""
    with answers_in(0.2) as server:
        assert all(isinstance(image, Image.Image) for image in asyncio.run(together(server.url, 8, deadline=9)))
    told = sorted(deadlines(server))
    assert told[3] < 8900
    assert told[-1] <= 9000


def test_a_call_that_waited_too_long_for_a_thread_is_not_sent() -> None:
    with answers_in(0.4) as server:
        outcomes = asyncio.run(together(server.url, 8, deadline=0.3))
        assert all(isinstance(outcome, TimedOut) for outcome in outcomes)
    # Those that got a thread in the last moment have no more than that moment.
    assert all(told < 200 for told in sorted(deadlines(server))[:-4])


def test_the_deadline_is_for_all_pictures_of_a_batch() -> None:
    with answers_in(0.25) as server, pytest.raises(TimedOut):
        remote_decode(server.url, torch.zeros(16, 4, 2, 2), deadline=0.6, timeout=5)
    assert len(server.requests) < 16


class Counting(FakeEngine):
    """Counts what it decodes, and decodes nothing before it may."""

    def __init__(self) -> None:
        engine = fake_engine()
        super().__init__(engine._config)  # type: ignore[attr-defined]
        self.load()
        self.decoded: list[float] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def decode(self, latents: torch.Tensor, plan: TilingPlan = UNTILED, hints: RequestHints = NO_HINTS) -> Decoded:
        self.decoded += latents[:, 0, 0, 0].tolist()
        self.begun.set()
        self.go_on.wait(WAIT_S)
        return super().decode(latents, plan, hints)


@contextmanager
def one_at_work(deadline_s: float = WAIT_S) -> Iterator[tuple[str, Counting]]:
    """A server whose device is busy with a first request, number 1."""
    engine = Counting()
    pipeline = pipeline_of(engine)
    with served(create_app(InProcess(model=pipeline.answer), 1 << 16, deadline_s)) as url:

        def ask() -> None:
            with suppress(DeadlineExceeded):
                decode(f"{url}/model", Z + 1, timeout=WAIT_S)

        first = threading.Thread(target=ask)
        first.start()
        assert engine.begun.wait(WAIT_S)
        yield f"{url}/model", engine
        engine.go_on.set()
        first.join()
    pipeline.close()


def assert_only_the_first_and_the_last_are_decoded(url: str, engine: Counting) -> None:
    engine.go_on.set()
    decode(url, Z + 9, timeout=WAIT_S)
    assert engine.decoded == [1, 9]


def test_a_request_that_its_client_gave_up_never_reaches_the_device() -> None:
    with one_at_work() as (url, engine):
        for number in range(2, 6):
            with pytest.raises((TimedOut, DeadlineExceeded)):
                decode(url, Z + number, deadline=0.15)
        time.sleep(0.05)  # the server's own clock began a little later
        assert_only_the_first_and_the_last_are_decoded(url, engine)


def test_it_is_the_header_that_the_server_goes_by_and_it_says_so() -> None:
    with one_at_work() as (url, engine):
        query, headers, body = DecodeRequest(from_array(Z + 2), deadline_s=0.15).to_http()
        answer = requests.post(url, params=query, headers=headers, data=bytes(body), timeout=WAIT_S)
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
        assert "150 ms" in answer.json()["error"]
        assert_only_the_first_and_the_last_are_decoded(url, engine)


def test_the_model_is_told_what_the_server_left_over() -> None:
    """Behind a handle nobody but the replica can drop a request that waits there."""
    told: list[float | None] = []

    async def model(request: DecodeRequest) -> Result:
        told.append(request.deadline_s)
        return Result("tensor/binary", request.latents.data, "float32", request.latents.shape)

    with served(create_app(InProcess(model=model), 1 << 16, 30)) as url:
        for deadline in (5, None, 60):
            decode(f"{url}/model", deadline=deadline, timeout=60)
    for seconds, most in zip(told, (5, 30, 30), strict=True):
        assert seconds is not None
        assert most - 2 < seconds <= most


def test_what_is_decoded_too_late_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline is looked at before each stage: of a JPEG that nobody takes not even the writing is done."""
    written: list[Any] = []
    monkeypatch.setattr("remote_vae_serve.replica.pipeline.codecs.write", lambda *given: written.append(given))
    pipeline = pipeline_of(fake_engine(decode_s=0.3))
    with pytest.raises(DeadlineExceeded, match="took longer"):
        asyncio.run(pipeline.answer(DecodeRequest(from_array(Z), deadline_s=0.1)))
    pipeline.close()
    assert written == []


def test_a_client_cannot_lengthen_the_servers_own_deadline() -> None:
    late = pytest.raises(DeadlineExceeded, match=r"server's deadline of 0\.3 s")
    with one_at_work(deadline_s=0.3) as (url, _), late:
        decode(url, Z + 2, timeout=60)


def test_through_a_handle_a_late_request_is_dropped_before_the_device() -> None:
    async def run() -> None:
        engine = Counting()
        pipeline = pipeline_of(engine)
        requests = [DecodeRequest(from_array(Z + 1)), DecodeRequest(from_array(Z + 2), deadline_s=0.05)]
        first = asyncio.create_task(pipeline.decode(requests[0]))
        await asyncio.to_thread(engine.begun.wait, WAIT_S)
        late = asyncio.create_task(pipeline.decode(requests[1]))
        await asyncio.sleep(0.1)
        engine.go_on.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await first
        assert engine.decoded == [1]
        pipeline.close()

    asyncio.run(run())
