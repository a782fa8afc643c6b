"""Which replica keeps a request before which all have work; and that what was let in is not refused later."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from remote_vae.errors import BadRequest, Overloaded
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.result import Provenance, Result
from remote_vae.protocol.tensors import from_array
from remote_vae.transports import handle
from remote_vae.transports.handle import HandleTransport
from remote_vae_serve.replica.handing_back import FIRST_HOLD_S, MOST, MOST_OF_ONE, HandingBack, handed_back_of
from samples import latents

REQUEST = DecodeRequest(from_array(latents(1, 4, 8, 8)), client="me", deadline_s=60.0)
RESULT = Result("image/png", np.zeros(3, np.uint8), "", (), Provenance("sd", None, "float32", (), ""))


def test_a_replica_hands_back_to_another_and_keeps_where_all_are_as_busy() -> None:
    first, second = HandingBack("first"), HandingBack("second")
    assert first.hold_s(10.0, ()) == FIRST_HOLD_S
    assert second.hold_s(9.0, [("first", 10.0)]) is None, "going round wins nothing"
    assert second.hold_s(100.0, [("first", 10.0)]) == FIRST_HOLD_S, "the other has much less"
    assert first.hold_s(10.0, [("first", 10.0), ("second", 100.0)]) is None


def test_where_there_seems_to_be_no_other_it_is_kept_soon() -> None:
    """Serve's router may prefer the one that is busy: it holds the request longer each time, while the others get on."""
    alone = HandingBack("alone")
    holds = [alone.hold_s(10.0, [("alone", 10.0)] * times) for times in range(MOST_OF_ONE)]
    assert holds == [FIRST_HOLD_S * 2**times for times in range(MOST_OF_ONE)]
    assert alone.hold_s(10.0, [("alone", 10.0)] * MOST_OF_ONE) is None
    assert alone.hold_s(99.0, [(f"other {number}", 1.0) for number in range(MOST)]) is None


@pytest.mark.parametrize(
    "strange", ["first", 3, [3], [("first",)], [("first", "soon")], [(1, 2.0)], [("first", float("nan"))]]
)
def test_what_no_replica_has_said_is_refused(strange: Any) -> None:
    with pytest.raises(BadRequest, match="handed_back"):
        handed_back_of(strange)


def test_one_whose_device_has_ended_hands_back_to_whoever_is_there() -> None:
    ended = [("ended", math.inf)]
    assert handed_back_of(ended) == ended
    assert HandingBack("ended").hold_s(math.inf, ()) == FIRST_HOLD_S
    assert HandingBack("another").hold_s(10.0, ended) is None, "it is better off here"


class Response:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def result(self, timeout_s: float | None) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def __await__(self) -> Iterator[Any]:
        yield from asyncio.sleep(0).__await__()
        return self.result(None)

    def cancel(self) -> None: ...


class Handle:
    """Replicas, as a test tells what each call is answered."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.told: list[Any] = []

    def options(self, **_: Any) -> Handle:
        return self

    @property
    def decode(self) -> Handle:
        return self

    @property
    def describe(self) -> SimpleNamespace:
        """Of its size it says nothing."""
        return SimpleNamespace(remote=lambda: Response(ModelDescription().to_plain()))

    def remote(self, plain: tuple[Any, ...], handed_back: Any) -> Response:
        self.told.append(handed_back)
        return Response(self._answers.pop(0))


def in_a_thread(transport: HandleTransport) -> Result:
    return transport.try_one(REQUEST)


def in_a_loop(transport: HandleTransport) -> Result:
    return asyncio.run(transport.try_one_async(REQUEST))


@pytest.fixture(params=[in_a_thread, in_a_loop])
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[HandleTransport], Result]:
    monkeypatch.setattr(handle, "FULL_PAUSE_S", 0.0)
    return request.param  # type: ignore[no-any-return]


def test_it_goes_round_with_the_names_of_those_that_were_busy(call: Callable[[HandleTransport], Result]) -> None:
    replicas = Handle(("first", 3.0), ("second", 9.0), RESULT.to_plain())
    assert call(HandleTransport(replicas)).media_type == "image/png"
    assert replicas.told == [(), (("first", 3.0),), (("first", 3.0), ("second", 9.0))]


def test_what_was_let_in_waits_where_serves_queue_is_full_meanwhile(call: Callable[[HandleTransport], Result]) -> None:
    full = Overloaded("full", retry_after=1)
    replicas = Handle(("first", 3.0), full, full, RESULT.to_plain())
    assert call(HandleTransport(replicas)).media_type == "image/png"
    assert replicas.told[1:] == [(("first", 3.0),)] * 3
    with pytest.raises(Overloaded, match="full"):
        call(HandleTransport(Handle(full)))


def test_where_no_call_by_value_comes_through_everything_goes_by_reference(
    call: Callable[[HandleTransport], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port may be closed between two nodes: it is tried once in a while."""
    probes: list[float] = []
    replicas = Handle(*[RESULT.to_plain()] * 5)
    transport = HandleTransport(replicas)

    def probe() -> Response:
        probes.append(time.monotonic())
        return Response(TimeoutError())

    monkeypatch.setattr(transport, "_probe", probe)
    for _ in range(3):
        call(transport)
    assert len(probes) == 1
    assert transport._sizes is None
    transport._probes_again = 0.0
    monkeypatch.setattr(
        transport, "_probe", lambda: Response(ModelDescription(latent_channels=4, spatial_ratio=8).to_plain())
    )
    call(transport)
    assert transport._sizes is not None
