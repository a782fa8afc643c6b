"""Who is let in: fair shares of a queue among clients, asked before a body is read, and when to come again."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from remote_vae.errors import Overloaded
from remote_vae_serve import admission
from remote_vae_serve.admission import LONGEST_S, Admission
from remote_vae_serve.config import ASIDE
from told_serve import Serve, ingress_of, serve

__all__ = ["serve"]  # a fixture


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    told = Clock()
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: told.now))
    return told


def fill(one: Admission, client: str, places: int, stack: ExitStack) -> int:
    """How many requests of the client are let in until it is refused."""
    for count in range(places + 1):
        try:
            one.check(client, places)
        except Overloaded:
            return count
        stack.enter_context(one.place(client))
    raise AssertionError("nobody was refused")


def test_a_client_has_as_many_places_as_are_free_so_that_there_is_one_for_who_has_none() -> None:
    one = Admission("sd")
    with ExitStack() as places:
        assert fill(one, "greedy", 60, places) == 30
        assert fill(one, "second", 60, places) == 15
        with pytest.raises(Overloaded, match="queue of sd is full"):
            one.check("greedy", 60)
        for newcomer in "abcd":  # there always is one, if the queue is not too short for so many clients
            one.check(newcomer, 60)
            places.enter_context(one.place(newcomer))
    assert fill(one, "greedy", 60, ExitStack()) == 30


def test_the_first_is_let_in_however_short_the_queue_and_all_where_it_has_no_end() -> None:
    one = Admission("sd")
    with ExitStack() as places:
        assert fill(one, "a", 1, places) == 1
        for _ in range(1000):
            one.check("a", None)
            places.enter_context(one.place("a"))


def test_the_wait_is_what_those_before_take_at_the_rate_of_the_last_answers(clock: Clock) -> None:
    one = Admission("sd")
    for _ in range(20):  # four answers a second
        with one.place("a"):
            clock.now += 0.25
    with ExitStack() as places:
        for number in range(40):
            places.enter_context(one.place(str(number)))
        assert one.wait_s() == pytest.approx(10, rel=0.1)
        clock.now += 10_000  # nothing has been answered for hours
        assert one.wait_s() == LONGEST_S


def test_what_fails_is_no_answer_and_leaves_its_place(clock: Clock) -> None:
    one = Admission("sd")
    with pytest.raises(ValueError, match="x"), one.place("a"):
        raise ValueError("x")
    one.check("a", 1)
    assert one.wait_s() == 1


def test_a_full_queue_before_a_model_that_starts_says_how_long_the_start_takes() -> None:
    """A client that came again after a second would be refused until its retries are over."""
    assert Admission("sd").full(6.0).retry_after == 6
    assert "starting" in Admission("sd").full(6.0).message
    assert Admission("sd").full(0.1).retry_after == 1


@pytest.mark.parametrize(("holds", "places"), [((40 + ASIDE, 10), 40), ((4, 36), 40)], ids=["ours", "an operator's"])
def test_the_ingress_refuses_before_a_body_is_read(serve: Serve, holds: tuple[int, int], places: int) -> None:
    serve.deploys("RUNNING", holds=holds)
    serve.state()
    one = ingress_of(serve)
    with ExitStack() as held:
        for _ in range(places // 2):
            held.enter_context(one.place("sd", "greedy"))
        with pytest.raises(Overloaded, match="queue of sd is full"), one.place("sd", "greedy"):
            pass
        with one.place("sd", "another"):
            pass
    serve.deploys("RUNNING", "RUNNING", holds=holds)  # another replica has come
    serve.state()
    assert (serve.registry.get("sd").places or 0) > places


@pytest.mark.parametrize(
    ("running", "places"), [((), 40), (("RUNNING",), 40), (("RUNNING", "RUNNING", "STARTING"), 20)]
)
def test_ingresses_share_what_the_replicas_hold(serve: Serve, running: tuple[str, ...], places: int) -> None:
    """What the second let in as well would wait in Serve's router, and be refused once it came to the replica: after seconds."""
    replicas = [{"replica_id": f"{number}", "state": state} for number, state in enumerate(running)]
    deployment = {"replicas": replicas, "required_resources": {}}
    serve.applications["remote-vae"] = {"status": "RUNNING", "deployments": {"Ingress": deployment}}
    serve.deploys("RUNNING", holds=(40 + ASIDE, 10))
    serve.state()
    assert serve.registry.get("sd").places == places


def test_what_serves_queue_refuses_before_a_model_that_starts_is_told_the_length_of_the_start(serve: Serve) -> None:
    class Full:
        async def try_one_async(self, request: Any) -> Any:
            raise Overloaded("The model's queue is full; try again", retry_after=1)

    serve.deploys(target=0, holds=(2, 1))
    assert serve.state() == "cold"
    assert serve.registry.get("sd").places == 1
    with pytest.raises(Overloaded, match="starting") as caught:
        asyncio.run(ingress_of(serve)._answer(Full(), "sd", Admission("sd"), "anything"))  # type: ignore[arg-type]
    assert caught.value.retry_after == serve.registry.get("sd").start_s > 1
