"""How long a client waits and how often it tries: pure, on a clock of the test's own. Nobody sleeps here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from remote_vae import errors
from remote_vae.errors import BadRequest, ConnectionFailed, ModelFailed, Overloaded, RemoteVAEError, TimedOut
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array
from remote_vae.transports import retry, transport
from remote_vae.transports.retry import FIRST_PAUSE_S, LONGEST_BACKOFF_S, LONGEST_WAIT_S, RetryPolicy, RetryState
from remote_vae.transports.transport import Transport

REQUEST = DecodeRequest(from_array(np.zeros((1, 4, 2, 2), np.float32)))
RESULT = Result("image/png", np.zeros(3, np.uint8))
MENDABLE = [
    errors.Unavailable, errors.Overloaded, errors.ModelStarting, errors.ConnectionFailed, errors.ConnectionLost,
]  # fmt: skip
BY_A_DEADLINE = [errors.TimedOut, errors.DeadlineExceeded]
FINAL = sorted(
    {*errors.SENT, *BY_A_DEADLINE, errors.BrokenReply, errors.BlockingCall} - {*MENDABLE, errors.UnknownRoute},
    key=lambda kind: kind.code,
)


class Clock:
    """Time that passes only when somebody sleeps; `asyncio.sleep` too."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    with monkeypatch.context() as patch:
        # The client's modules alone are told: threads of other tests sleep too.
        told = SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep)
        for module in (retry, transport):
            patch.setattr(module, "time", told)
        patch.setattr(retry, "random", SimpleNamespace(uniform=lambda low, high: low))
        yield clock


class Scripted(Transport):
    """Fails as told, one error a try, then answers; each try takes `takes_s`."""

    def __init__(self, clock: Clock, retry_policy: RetryPolicy, *fails: RemoteVAEError, takes_s: float = 0.0) -> None:
        self.retry_policy = retry_policy
        self.granted: list[float | None] = []
        self._clock, self._fails, self._takes_s = clock, list(fails), takes_s

    def try_one(self, request: Request) -> Result:
        self.granted.append(request.deadline_s)
        self._clock.now += self._takes_s
        if self._fails:
            raise self._fails.pop(0)
        return RESULT

    async def try_one_async(self, request: Request) -> Result:
        return self.try_one(request)

    def describe(self, wake: bool = False) -> ModelDescription:
        return ModelDescription()

    async def describe_async(self, wake: bool = False) -> ModelDescription:
        return ModelDescription()


def pauses(state: RetryState, clock: Clock, *failures: RemoteVAEError) -> list[float]:
    """The pause after each of them, slept."""
    made = []
    for failure in failures:
        made.append(state.pause_after(failure))
        clock.sleep(made[-1])
    return made


def test_each_pause_is_twice_as_long_as_the_last(clock: Clock) -> None:
    state = RetryState(RetryPolicy(retries=5))
    assert pauses(state, clock, *[Overloaded("Full.")] * 5) == [FIRST_PAUSE_S * 2**n for n in range(5)]


def test_a_pause_stops_growing(clock: Clock) -> None:
    made = pauses(RetryState(RetryPolicy(retries=5000)), clock, *[Overloaded("Full.")] * 2000)
    assert max(made) == made[-1] == LONGEST_BACKOFF_S
    assert made == sorted(made)


def test_there_is_chance_in_a_pause_and_never_less_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that one overload sent away together would come back together."""
    bounds = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return high

    monkeypatch.setattr(retry, "random", SimpleNamespace(uniform=uniform))
    pause = RetryState(RetryPolicy()).pause_after(Overloaded("Full.", retry_after=8))
    ((low, high),) = bounds
    assert low >= 1 < high
    assert pause == 8 * high


@pytest.mark.parametrize(
    ("retry_after", "pause"), [(None, FIRST_PAUSE_S), (0, FIRST_PAUSE_S), (0.1, FIRST_PAUSE_S), (7, 7), (30.5, 30.5)]
)
def test_retry_after_lengthens_a_pause_and_shortens_none(retry_after: float | None, pause: float) -> None:
    assert RetryState(RetryPolicy()).pause_after(Overloaded("Full.", retry_after=retry_after)) == pause


def test_a_server_that_asks_for_an_hour_is_not_waited_for() -> None:
    error = Overloaded("Full.", retry_after=3600)
    with pytest.raises(Overloaded) as caught:
        RetryState(RetryPolicy()).pause_after(error)
    assert caught.value is error


@pytest.mark.parametrize("header", ["nan", "inf", "-inf", "-5", "1e400", "", "soon"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_retry_after_that_nobody_can_sleep_is_none(status: int, header: str) -> None:
    error = errors.parse(status, {"retry-after": header}, b"")
    assert error.retry_after is None
    assert RetryState(RetryPolicy()).pause_after(error) == FIRST_PAUSE_S


@pytest.mark.parametrize("kind", MENDABLE)
def test_what_time_may_mend_is_tried_again(clock: Clock, kind: type[RemoteVAEError]) -> None:
    transport = Scripted(clock, RetryPolicy(retries=2), kind("No."), kind("Still no."))
    assert transport.send_one(REQUEST) is RESULT
    assert len(transport.granted) == 3
    assert clock.slept == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S]


@pytest.mark.parametrize("kind", [*FINAL, *BY_A_DEADLINE])
def test_what_time_does_not_mend_is_raised_at_once(clock: Clock, kind: type[RemoteVAEError]) -> None:
    error = kind("No.", retry_after=1)
    transport = Scripted(clock, RetryPolicy(retries=5), error)
    with pytest.raises(kind) as caught:
        transport.send_one(REQUEST)
    assert caught.value is error
    assert clock.slept == []


@pytest.mark.parametrize("kind", BY_A_DEADLINE)
def test_a_try_that_took_its_time_out_is_tried_again_where_the_call_has_longer(
    clock: Clock, kind: type[RemoteVAEError]
) -> None:
    transport = Scripted(clock, RetryPolicy(timeout=4, deadline=60), kind("Silence."), kind("Silence."), takes_s=4)
    assert transport.send_one(REQUEST) is RESULT
    assert transport.granted == [4, 4, 4]


def test_with_a_deadline_it_is_tried_until_then_and_never_long_after_the_server_is_back(clock: Clock) -> None:
    """A proxy that died is away for half a minute; three retries are over after four seconds."""
    transport = Scripted(clock, RetryPolicy(deadline=60), *[ConnectionFailed("Nobody.")] * 1000)
    with pytest.raises(ConnectionFailed):
        transport.send_one(REQUEST)
    assert 60 - 1.25 * LONGEST_BACKOFF_S < sum(clock.slept) < 60
    clock.slept.clear()
    with pytest.raises(ConnectionFailed):
        Scripted(clock, RetryPolicy(deadline=60, retries=2), *[ConnectionFailed("Nobody.")] * 9).send_one(REQUEST)
    assert len(clock.slept) == 2  # who says a number gets it


def test_a_proxy_that_is_coming_up_knows_no_route_yet(clock: Clock) -> None:
    texts = (
        b"Path '/sd' not found. Please ping http://.../-/routes for available routes.",
        json.dumps({"error": "Nothing is served", "code": "unknown_route", "request_id": "1"}).encode(),
    )
    for text, headers in zip(texts, ({}, {"retry-after": "2"}), strict=True):
        error = errors.parse(404, headers, text)
        assert Scripted(clock, RetryPolicy(), error).send_one(REQUEST) is RESULT
    with pytest.raises(errors.UnknownRoute):  # what an app of ours says is so
        Scripted(clock, RetryPolicy(), errors.parse(404, {}, texts[1])).send_one(REQUEST)


def test_a_failed_model_is_unavailable_and_yet_not_tried_again() -> None:
    with pytest.raises(ModelFailed):
        RetryState(RetryPolicy()).pause_after(ModelFailed("The weights are gone.", retry_after=30))


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_retries_are_tries_besides_the_first_and_the_last_error_is_the_one_raised(clock: Clock, retries: int) -> None:
    failures = [Overloaded(f"Full for the {number}th time.") for number in range(10)]
    transport = Scripted(clock, RetryPolicy(retries=retries), *failures)
    with pytest.raises(Overloaded, match=f"{retries}th"):
        transport.send_one(REQUEST)
    assert len(transport.granted) == retries + 1


def test_async_waits_as_long_as_blocking_does(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "sleep", clock.sleep_async)
    failures = [Overloaded("Full.", retry_after=3), ConnectionFailed("Nobody.")]
    blocking = Scripted(clock, RetryPolicy(deadline=60), *failures, takes_s=0.25)
    assert blocking.send_one(REQUEST) is RESULT
    slept, clock.slept = clock.slept, []
    patient = Scripted(clock, RetryPolicy(deadline=60), *failures, takes_s=0.25)
    assert asyncio.run(patient.send_one_async(REQUEST)) is RESULT
    assert clock.slept == slept == [3, 2 * FIRST_PAUSE_S]
    assert patient.granted == blocking.granted


def test_each_try_is_granted_what_the_last_ones_and_the_pauses_left_over(clock: Clock) -> None:
    transport = Scripted(clock, RetryPolicy(timeout=None, deadline=10), *[Overloaded("Full.")] * 2, takes_s=1.5)
    transport.send_one(REQUEST)
    assert transport.granted == [10, 10 - 1.5 - 0.5, 10 - 2 * 1.5 - 0.5 - 1.0]


@pytest.mark.parametrize(
    ("timeout", "deadline", "granted"),
    [((2, 5), None, 7), (4, None, 4), ((2, 5), 3, 3), (4, 60, 4), (None, 8, 8), ((None, 5), None, None), (None, None, None),
     ((2, None), 9, 9)],
)  # fmt: skip
def test_a_try_is_granted_the_shorter_of_time_out_and_deadline(
    clock: Clock, timeout: Any, deadline: float | None, granted: float | None
) -> None:
    transport = Scripted(clock, RetryPolicy(timeout, deadline))
    transport.send_one(REQUEST)
    assert transport.granted == [granted]


def test_a_pause_that_would_end_after_the_deadline_is_not_begun(clock: Clock) -> None:
    transport = Scripted(clock, RetryPolicy(deadline=5), Overloaded("Full.", retry_after=5))
    with pytest.raises(Overloaded):
        transport.send_one(REQUEST)
    assert clock.slept == []


def test_no_call_takes_longer_than_its_deadline(clock: Clock) -> None:
    begun = clock.now
    transport = Scripted(clock, RetryPolicy(deadline=5, retries=100), *[Overloaded("Full.")] * 100, takes_s=0.1)
    with pytest.raises(Overloaded):
        transport.send_one(REQUEST)
    assert clock.now - begun <= 5
    assert len(transport.granted) > 2


def test_a_try_whose_turn_comes_after_the_deadline_is_not_made(clock: Clock) -> None:
    state = RetryState(RetryPolicy(deadline=2))
    clock.now += 2
    with pytest.raises(TimedOut, match=r"deadline of 2 s"):
        state.left_s(300)


def test_the_deadline_is_one_for_all_requests_of_a_call(clock: Clock) -> None:
    """A batch of pictures is a request each: the last of them has what the first left over."""
    for send in (Scripted.send, lambda transport, batch: asyncio.run(transport.send_async(batch))):
        transport = Scripted(clock, RetryPolicy(timeout=None, deadline=10), takes_s=1)
        send(transport, [REQUEST] * 8)
        assert sorted(map(float, transport.granted)) == list(range(3, 11))


def test_a_call_whose_requests_outlast_its_deadline_times_out(clock: Clock) -> None:
    for send in (Scripted.send, lambda transport, batch: asyncio.run(transport.send_async(batch))):
        transport = Scripted(clock, RetryPolicy(timeout=None, deadline=10), takes_s=3)
        with pytest.raises(TimedOut):
            send(transport, [REQUEST] * 8)
        assert len(transport.granted) == 4


@pytest.mark.parametrize(
    "value", [0, -1, float("nan"), float("inf"), 10 * LONGEST_WAIT_S, "3", True, False, [1, 2], object], ids=repr
)
@pytest.mark.parametrize("name", ["timeout", "deadline"])
def test_a_wait_that_is_none_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=f"{name} is") as caught:
        RetryPolicy(**{name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize("timeout", [(), (1,), (1, 2, 3), (1, 0), (float("inf"), 1), (None, "x")], ids=repr)
def test_a_time_out_of_several_is_a_pair(timeout: Any) -> None:
    with pytest.raises(BadRequest, match="pair"):
        RetryPolicy(timeout)


def test_the_argument_at_fault_is_named_where_the_other_has_the_same_value() -> None:
    with pytest.raises(BadRequest, match="deadline is"):
        RetryPolicy(timeout=None, deadline=0)
    with pytest.raises(BadRequest, match="timeout is"):
        RetryPolicy(timeout=0, deadline=None)


@pytest.mark.parametrize("retries", [-1, 1.0, "3", True])
def test_retries_that_are_no_count_are_refused(retries: Any) -> None:
    with pytest.raises(BadRequest, match="retries is") as caught:
        RetryPolicy(retries=retries)
    assert caught.value.parameter == "retries"


def test_a_retry_policy_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        RetryPolicy().retries = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("timeout", "pair"), [(5, (5, 5)), ((1, 2), (1, 2)), (None, (None, None)), ((None, 2), (None, 2))]
)
def test_a_time_out_is_for_both_or_for_each(timeout: Any, pair: Any) -> None:
    assert RetryPolicy(timeout).connect_and_answer == pair
    assert RetryPolicy(timeout).answer_s == pair[1]
