"""At a model's own path: a request with long work before it goes to another replica by handle, if there is one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from remote_vae.errors import Overloaded, RemoteVAEError, Unavailable
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.result import Provenance, Result
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.replica import handing_on
from remote_vae_serve.replica.handing_on import KNOWN_S, MOST, HandingOn
from samples import latents

REQUEST = DecodeRequest(from_array(latents(1, 4, 8, 8)), client="me", deadline_s=60.0)
RESULT = Result("image/png", np.zeros(3, np.uint8), "", (), Provenance("sd", None, "float32", (), ""))


class Serve:
    """A Serve with so many replicas of the model; and its handle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replicas = 2
        self.answer: Result | RemoteVAEError = RESULT
        self.asked: list[Any] = []
        self.status_read = 0
        self.now = 1000.0
        monkeypatch.setattr(handing_on.serve, "status", self.status)
        monkeypatch.setattr(handing_on.HandleTransport, "of_app", lambda *_: self)
        monkeypatch.setattr(handing_on, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.gate = asyncio.Event()
        self.gate.set()

    def status(self) -> Any:
        self.status_read += 1
        if self.replicas < 0:
            raise ConnectionError
        deployment = SimpleNamespace(replica_states={"RUNNING": self.replicas})
        return SimpleNamespace(applications={"sd": SimpleNamespace(deployments={"VAE": deployment})})

    async def try_one_async(self, request: Any, handed_back: Any) -> Result:
        self.asked.append((request, handed_back))
        await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return Serve(monkeypatch)


def test_another_replica_is_asked_with_what_it_would_wait_here(serve: Serve) -> None:
    assert asyncio.run(HandingOn("sd", "here").answer(REQUEST, 9.0)) is RESULT
    assert serve.asked == [(REQUEST, (("here", 9.0),))]


@pytest.mark.parametrize("replicas", [1, 0, -1], ids=["alone", "none known", "the controller restarts"])
def test_who_is_alone_keeps_it(serve: Serve, replicas: int) -> None:
    serve.replicas = replicas
    assert asyncio.run(HandingOn("sd", "here").answer(REQUEST, 9.0)) is None
    assert not serve.asked


def test_how_many_there_are_is_asked_now_and_then(serve: Serve) -> None:
    serve.replicas = 1
    one = HandingOn("sd", "here")

    async def ask() -> list[Any]:
        answers = [await one.answer(REQUEST, 9.0) for _ in range(3)]
        serve.replicas, serve.now = 2, serve.now + KNOWN_S
        return [*answers, *[await one.answer(REQUEST, 9.0) for _ in range(3)]]

    assert asyncio.run(ask()) == [None, None, None, RESULT, RESULT, RESULT]
    assert serve.status_read == 2


def test_it_stays_where_the_others_queue_is_full_and_no_more_than_some_are_with_others(serve: Serve) -> None:
    one = HandingOn("sd", "here")
    serve.answer = Overloaded("full")
    assert asyncio.run(one.answer(REQUEST, 9.0)) is None

    async def many() -> list[Any]:
        serve.answer, serve.gate = RESULT, asyncio.Event()
        first = [asyncio.ensure_future(one.answer(REQUEST, 9.0)) for _ in range(MOST)]
        while len(serve.asked) < MOST + 1:
            await asyncio.sleep(0.01)
        assert await one.answer(REQUEST, 9.0) is None
        serve.gate.set()
        return [*await asyncio.gather(*first), await one.answer(REQUEST, 9.0)]

    assert asyncio.run(many()) == [RESULT] * (MOST + 1)


def test_what_went_wrong_there_is_what_the_client_hears(serve: Serve) -> None:
    """Not once more here: it may have been executed."""
    serve.answer = Unavailable("the replica died")
    with pytest.raises(Unavailable, match="died"):
        asyncio.run(HandingOn("sd", "here").answer(REQUEST, 9.0))
