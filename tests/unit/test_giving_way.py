"""A model that has given up its GPU to another: requests for it wait in the ingress, or Serve would have it race for the GPU."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from remote_vae.errors import ModelStarting
from remote_vae_serve.config import IngressConfig
from remote_vae_serve.ingress import ingress, model_registry
from remote_vae_serve.ingress.resource_shortages import Shortage
from remote_vae_serve.scaling import ASKED_FOR_S
from told_serve import Serve, ingress_of, serve

__all__ = ["serve"]  # a fixture


class Way:
    """What Ray's key-value store says, and how often it was asked."""

    def __init__(self, given: int) -> None:
        self.asked, self._given = 0, given

    def is_given(self, name: str) -> bool:
        self.asked += 1
        return self.asked <= self._given


class Transport:
    async def try_one_async(self, request: object) -> object:
        return request


@pytest.fixture
def asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """`sd` holds what `flux` waits for, and was asked to yield."""
    to_yield: list[str] = []
    monkeypatch.setattr(model_registry, "ask_to_yield", to_yield.append)
    shortage = Shortage({"GPU": 1.0}, ("sd",), certain=True)
    monkeypatch.setattr(model_registry, "shortages", lambda *_: {"flux": shortage})
    serve.deploys("RUNNING")
    serve.state()
    assert to_yield == ["sd"]
    return serve


def answer_of(serve: Serve) -> Any:
    return asyncio.run(ingress_of(serve)._placed(Transport(), "sd", "request"))  # type: ignore[arg-type]


def test_a_request_for_it_waits_until_the_other_runs(asked: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way(given=3)
    monkeypatch.setattr(model_registry, "gives_way", way.is_given)
    assert answer_of(asked) == "request"
    assert way.asked == 4


class Stuck:
    """A transport whose replica does not come for so many looks."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    async def try_one_async(self, request: object) -> object:
        await asyncio.sleep(self._looks * ingress.WATCH_S)
        return request


@pytest.mark.parametrize(("turn_s", "is_refused"), [(0.05, False), (600.0, True), (math.inf, True)])
def test_it_waits_for_its_turn_as_long_as_it_may_and_for_what_is_kept_only_a_while(
    turn_s: float, is_refused: bool, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress, "WATCH_S", 0.02)
    monkeypatch.setattr(model_registry, "ask_to_yield", lambda name: None)
    monkeypatch.setattr(
        model_registry, "shortages", lambda *_: {"sd": Shortage({"GPU": 1.0}, ("flux",), turn_s=turn_s)}
    )
    serve.deploys("STARTING")
    serve.state()
    one = ingress_of(serve)
    one._config = IngressConfig(placement_wait_s=0.1)
    asked = one._placed(Stuck(looks=50), "sd", "request")  # type: ignore[arg-type]
    if is_refused:
        with pytest.raises(ModelStarting, match="flux holds it"):
            asyncio.run(asked)
    else:
        assert asyncio.run(asked) == "request"


def test_who_was_not_asked_lately_costs_no_question(asked: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way(given=1)
    monkeypatch.setattr(model_registry, "gives_way", way.is_given)
    asked.now += ASKED_FOR_S
    assert answer_of(asked) == "request"
    assert way.asked == 0


def test_a_control_plane_that_is_away_costs_no_request(asked: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(name: str) -> bool:
        raise ConnectionError("no GCS")

    monkeypatch.setattr(model_registry, "gives_way", away)
    assert answer_of(asked) == "request"


def test_who_was_asked_is_told_once_the_other_runs(asked: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes again at its next request then, and not only once nobody has asked for a while."""
    taken_back: list[str] = []
    monkeypatch.setattr(model_registry, "take_back", taken_back.append)
    monkeypatch.setattr(model_registry, "shortages", lambda *_: {})
    asked.applications["flux"] = starting(asked.applications["sd"])
    asked.state()
    assert taken_back == []  # it is being loaded
    asked.applications["flux"] = asked.applications["sd"]
    asked.state()
    assert taken_back == ["sd"]
    asked.state()
    assert taken_back == ["sd"]


def test_as_long_as_a_third_one_waits_for_it_nothing_is_taken_back(
    asked: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_back: list[str] = []
    monkeypatch.setattr(model_registry, "take_back", taken_back.append)
    shortage = Shortage({"GPU": 1.0}, ("sd",), certain=False)
    monkeypatch.setattr(model_registry, "shortages", lambda *_: {"third": shortage})
    asked.applications["flux"] = asked.applications["sd"]
    asked.state()
    assert taken_back == []


def starting(application: Any) -> Any:
    """The same before its replica runs."""
    deployment = application["deployments"]["VAE"]
    replicas = [replica | {"state": "STARTING"} for replica in deployment["replicas"]]
    return application | {"deployments": {"VAE": deployment | {"replicas": replicas}}}
