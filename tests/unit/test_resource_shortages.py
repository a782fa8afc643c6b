"""Who waits for what, read out of Serve's details."""

from __future__ import annotations

import math
from typing import Any

import pytest

from remote_vae_serve.ingress.resource_shortages import Shortage, shortages
from remote_vae_serve.scaling import TURN_S, YieldWhenIdle


def application(gpus: float, *placed: bool, scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    """An application with one replica for each of `placed`."""
    replicas = [{"replica_id": str(n)} | ({"node_id": "n"} if here else {}) for n, here in enumerate(placed)]
    deployment = {"required_resources": {"CPU": 0.1, "GPU": gpus}, "replicas": replicas}
    return {"deployments": {"VAE": deployment | {"deployment_config": {"autoscaling_config": scaling}}}}


TOTAL = {"CPU": 4.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("applications", "total", "available", "expected"),
    [
        ({"flux": application(1, True)}, TOTAL, {"CPU": 3.9}, {}),
        ({"flux": application(1, True), "sd": application(1, False)}, TOTAL, {"CPU": 3.9},
         {"sd": Shortage({"GPU": 1}, ("flux",))}),
        ({"a": application(0.5, True), "b": application(0.4, True), "c": application(0.3, False)}, TOTAL, {"CPU": 3, "GPU": 0.1},
         {"c": Shortage({"GPU": 0.3}, ("a", "b"))}),
        ({"a": application(0.5, True), "c": application(0.3, False)}, TOTAL, {"CPU": 3, "GPU": 0.5}, {}),
        ({"sd": application(1, False)}, {"CPU": 4.0}, {"CPU": 4.0}, {"sd": Shortage({"GPU": 1}, ())}),
        ({"flux": application(1, True), "sd": application(1, False)}, {"CPU": 4.0, "GPU": 3.0}, {"CPU": 3.9},
         {"sd": Shortage({"GPU": 1}, ("flux",), certain=False)}),
        ({"sd": application(1, True, False), "x": application(0, True)}, TOTAL, {"CPU": 3.9}, {}),
        ({"x": application(0, True), "sd": application(1, False)}, {"CPU": 4.0}, {"CPU": 4.0}, {"sd": Shortage({"GPU": 1}, ())}),
    ],
    ids=["nobody waits", "one holds it", "shares add up", "a share is free", "no node has one", "others hold it",
         "a further replica may wait", "what holds none is no holder"],
)  # fmt: skip
def test_a_shortage_names_what_is_missing_and_who_holds_it(
    applications: dict[str, Any], total: dict[str, float], available: dict[str, float], expected: dict[str, Shortage]
) -> None:
    assert shortages(applications, total, available) == expected


def yielding(
    min_replicas: int = 0, policy: str = f"{YieldWhenIdle.__module__}:{YieldWhenIdle.__name__}", **kwargs: object
) -> Any:
    return {"min_replicas": min_replicas, "policy": {"policy_function": policy, "policy_kwargs": kwargs}}


@pytest.mark.parametrize(
    ("scaling", "turn_s"),
    [
        (yielding(), TURN_S),
        (yielding(turn_s=600), 600),
        (yielding(turn_s="soon"), TURN_S),
        (yielding(min_replicas=1), math.inf),
        (yielding(policy="of.somebody:Else"), math.inf),
        ({"min_replicas": 0}, math.inf),
        (None, math.inf),
    ],
)
def test_it_tells_how_long_who_holds_it_may_keep_it(scaling: Any, turn_s: float) -> None:
    applications = {"flux": application(0.5, True, scaling=scaling), "x": application(0.5, True, scaling=yielding())}
    waiting = shortages(applications | {"sd": application(1, False)}, TOTAL, {"CPU": 3.9})
    assert waiting == {"sd": Shortage({"GPU": 1}, ("flux", "x"), turn_s=turn_s)}
    del applications["flux"]
    assert shortages(applications | {"sd": application(1, False)}, TOTAL, {"CPU": 3.9})["sd"].turn_s == TURN_S


def test_it_reads_as_a_sentence() -> None:
    assert str(Shortage({"GPU": 1}, ("flux",))) == "waits for 1 GPU; flux holds it"
    assert str(Shortage({"GPU": 0.5}, ("a", "b"))) == "waits for 0.5 GPU; a, b hold it"
    assert str(Shortage({"GPU": 1}, ())) == "waits for 1 GPU; no node of the cluster has it free"
