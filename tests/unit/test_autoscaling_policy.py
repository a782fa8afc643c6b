"""The autoscaling policy: when the last replica goes; and a mistake in its arguments must not stop Serve's controller."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from remote_vae_serve import scaling
from remote_vae_serve.scaling import (
    ASKED_FOR_S,
    FRESH_S,
    GIVES_WAY_S,
    IDLE_S,
    NOTICE_S,
    TURN_S,
    USED,
    YieldWhenIdle,
    ask_to_yield,
    gives_way,
    take_back,
)

CONFIG = AutoscalingConfig(min_replicas=0, max_replicas=4, target_ongoing_requests=1)


class Serve:
    """What Serve's controller tells a policy, at a time of the test's choosing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        store: dict[bytes, bytes] = {}
        monkeypatch.setattr(scaling, "_get", store.get)
        monkeypatch.setattr(scaling, "_put", lambda key, value, overwrite: store.update({key: value}))
        monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now))

    def asks(
        self,
        policy: YieldWhenIdle,
        replicas: int,
        requests: int = 0,
        after_s: float = 0,
        used: dict[str, float] | None = None,
        waiting: int = 0,
    ) -> float:
        """How many replicas the policy wants, where these say how much they were used."""
        self.now += after_s
        known: dict[str, Any] = dict.fromkeys(
            ("deployment_id", "raw_metrics", "last_scale_up_time", "last_scale_down_time")
        )
        known["aggregated_metrics"] = None if used is None else {USED: used}
        context = AutoscalingContext(
            **known, deployment_name="VAE", app_name="sd", current_num_replicas=replicas, target_num_replicas=replicas,
            running_replicas=[str(number) for number in range(replicas)], total_num_requests=requests,  # type: ignore[misc]
            total_queued_requests=waiting, capacity_adjusted_min_replicas=0,
            capacity_adjusted_max_replicas=4, policy_state={}, current_time=self.now, config=CONFIG,
        )  # fmt: skip
        return policy(context)[0]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return Serve(monkeypatch)


def test_the_last_replica_stays_until_it_has_been_idle_for_long_enough(serve: Serve) -> None:
    policy = YieldWhenIdle(idle_s=60)
    assert serve.asks(policy, replicas=1) == 1
    assert serve.asks(policy, replicas=1, after_s=59) == 1
    assert serve.asks(policy, replicas=1, requests=1) == 1
    assert serve.asks(policy, replicas=1, after_s=59) == 1  # a request has begun the minute anew
    assert serve.asks(policy, replicas=1, after_s=59) == 1
    assert serve.asks(policy, replicas=1, after_s=1) == 0


def test_reading_what_a_model_is_keeps_none_awake(serve: Serve) -> None:
    """Serve counts a GET while it runs; the replica knows that it decoded nothing."""
    policy = YieldWhenIdle(idle_s=60)
    assert serve.asks(policy, replicas=1, requests=1, used={"0": 0.0}) == 1
    assert serve.asks(policy, replicas=1, requests=1, used={"0": 0.0}, after_s=60) == 0


@pytest.mark.parametrize(
    "busy", [{"used": {"0": 0.1}}, {"used": {"0": 0.0}, "waiting": 1}], ids=["worked", "is waited for"]
)
def test_a_model_that_has_worked_lately_or_is_waited_for_is_not_idle_whatever_runs_now(
    serve: Serve, busy: dict[str, Any]
) -> None:
    policy = YieldWhenIdle(idle_s=60)
    for _ in range(3):
        assert serve.asks(policy, replicas=1, after_s=59, **busy) == 1
    assert serve.asks(policy, replicas=1, after_s=59, used={"0": 0.0}) == 1
    assert serve.asks(policy, replicas=1, after_s=60, used={"0": 0.0}) == 0


@pytest.mark.parametrize("used", [None, {}, {"0": 0.0}], ids=["nobody", "none yet", "not all"])
def test_where_a_replica_has_not_told_serves_own_count_holds(serve: Serve, used: dict[str, float] | None) -> None:
    policy = YieldWhenIdle(idle_s=60)
    serve.asks(policy, replicas=2, requests=1, used=used)
    assert serve.asks(policy, replicas=2, requests=1, used=used, after_s=600) >= 1


def test_of_several_replicas_that_are_idle_one_stays(serve: Serve) -> None:
    assert serve.asks(YieldWhenIdle(idle_s=60), replicas=3) == 1


def test_a_model_without_a_replica_gets_one_for_a_request_and_none_for_nothing(serve: Serve) -> None:
    policy = YieldWhenIdle(idle_s=60)
    assert serve.asks(policy, replicas=0) == 0
    assert serve.asks(policy, replicas=0, requests=1) >= 1


def test_who_is_asked_to_yield_goes_at_once_if_idle_and_only_while_somebody_waits(serve: Serve) -> None:
    policy = YieldWhenIdle(idle_s=600)
    assert serve.asks(policy, replicas=1) == 1
    assert serve.asks(policy, replicas=1, requests=1, after_s=FRESH_S) == 1
    ask_to_yield("sd")
    assert serve.asks(policy, replicas=1, requests=1) == 1
    assert serve.asks(policy, replicas=1) == 1
    assert serve.asks(policy, replicas=1, after_s=NOTICE_S) == 0
    assert serve.asks(policy, replicas=1, after_s=ASKED_FOR_S) == 1
    ask_to_yield("flux")
    assert serve.asks(policy, replicas=1) == 1


def test_one_that_has_just_started_is_not_idle_whatever_serve_knows_of_it_yet(serve: Serve) -> None:
    policy = YieldWhenIdle(idle_s=600)
    ask_to_yield("sd")
    assert serve.asks(policy, replicas=1) == 1
    assert serve.asks(policy, replicas=1, after_s=FRESH_S - 1) == 1
    assert not gives_way("sd")
    assert serve.asks(policy, replicas=1, after_s=1) == 1
    assert gives_way("sd")


def test_a_busy_one_goes_when_its_turn_is_over_and_not_before(serve: Serve) -> None:
    policy = YieldWhenIdle(idle_s=600, turn_s=10)
    for after_s in (0, 5, 4):
        ask_to_yield("sd")  # the ingress does, as long as somebody waits
        assert serve.asks(policy, replicas=1, requests=1, after_s=after_s) == 1
    assert not gives_way("sd")
    ask_to_yield("sd")
    assert serve.asks(policy, replicas=1, requests=1, after_s=1) == 1
    assert serve.asks(policy, replicas=1, requests=1, after_s=NOTICE_S) == 0


def test_that_it_gives_way_is_said_before_it_goes_so_that_no_request_is_left_waiting_for_it(serve: Serve) -> None:
    """Serve would start a replica for that request at once, whatever the policy says."""
    policy = YieldWhenIdle(turn_s=0)
    ask_to_yield("sd")
    assert serve.asks(policy, replicas=1, requests=1) == 1
    assert gives_way("sd")
    assert serve.asks(policy, replicas=1, requests=1, after_s=NOTICE_S / 2) == 1
    assert serve.asks(policy, replicas=1, requests=1, after_s=NOTICE_S / 2) == 0


def test_one_that_has_come_out_of_turn_answers_those_who_wait_for_it(serve: Serve) -> None:
    """By a handle, say. To stop it at once, and the next one too, would serve nobody."""
    policy = YieldWhenIdle(turn_s=5)
    for after_s in (0, 5, NOTICE_S):
        ask_to_yield("sd")
        wanted = serve.asks(policy, replicas=1, requests=1, after_s=after_s)
    assert wanted == 0
    for replicas, after_s in ((0, 2), (1, 3), (1, 4)):
        ask_to_yield("sd")
        wanted = serve.asks(policy, replicas=replicas, requests=1, after_s=after_s)
    assert wanted == 1
    assert not gives_way("sd")


def test_once_the_other_runs_it_comes_again_without_delay(serve: Serve) -> None:
    policy = YieldWhenIdle(turn_s=0)
    ask_to_yield("sd")
    assert serve.asks(policy, replicas=1, requests=1) == 1
    assert serve.asks(policy, replicas=1, requests=1, after_s=NOTICE_S) == 0
    take_back("sd")
    assert not gives_way("sd")
    assert serve.asks(policy, replicas=0, requests=1) == 1


@pytest.mark.parametrize("requests", [0, 1])
def test_one_that_has_gone_comes_again_only_when_nobody_asks_any_more(serve: Serve, requests: int) -> None:
    """Else it races for the GPU with the one that it went for, and may win every time."""
    policy = YieldWhenIdle(idle_s=600, turn_s=10)
    for after_s in (0, 5, 5, NOTICE_S):
        ask_to_yield("sd")
        wanted = serve.asks(policy, replicas=1, requests=requests, after_s=after_s)
    assert wanted == 0
    assert gives_way("sd")
    ask_to_yield("sd")  # it finishes what it has begun, and holds the GPU meanwhile
    assert serve.asks(policy, replicas=0, requests=1, after_s=2) == 0
    assert serve.asks(policy, replicas=0, requests=1, after_s=ASKED_FOR_S - 3) == 0
    assert gives_way("sd")
    assert serve.asks(policy, replicas=0, requests=1, after_s=1) == 1
    ask_to_yield("sd")
    assert serve.asks(policy, replicas=1, requests=1, after_s=1) == 1  # its next turn begins anew
    assert not gives_way("sd")


def test_who_waited_and_was_served_otherwise_ends_no_turn(serve: Serve) -> None:
    policy = YieldWhenIdle(idle_s=600, turn_s=10)
    ask_to_yield("sd")
    assert serve.asks(policy, replicas=1, requests=1) == 1
    assert serve.asks(policy, replicas=1, requests=1, after_s=ASKED_FOR_S) == 1  # nobody asks any more
    ask_to_yield("sd")
    assert serve.asks(policy, replicas=1, requests=1, after_s=5) == 1


def test_of_several_that_are_busy_one_goes_at_the_end_of_a_turn(serve: Serve) -> None:
    policy = YieldWhenIdle(turn_s=0)
    ask_to_yield("sd")
    assert serve.asks(policy, replicas=3, requests=9) == 2


def test_of_several_that_are_busy_one_goes_for_each_turn_that_somebody_waits(serve: Serve) -> None:
    policy = YieldWhenIdle(turn_s=5)
    wanted = []
    for running, after_s in ((3, 0), (3, 5), (3, 1), (2, 3), (2, 1), (1, 1)):
        ask_to_yield("sd")
        wanted.append(serve.asks(policy, replicas=running, requests=9, after_s=after_s))
    assert wanted[1:] == [2, 2, 2, 1, 1]


def test_no_turn_ends_before_the_replica_of_the_one_before_has_gone(serve: Serve) -> None:
    """Serve's `downscale_delay_s` is longer than a turn: all of them would go at once at its end."""
    policy = YieldWhenIdle(turn_s=5)
    wanted = []
    for _ in range(6):
        ask_to_yield("sd")
        wanted.append(serve.asks(policy, replicas=3, requests=9, after_s=5))
    assert wanted[1:] == [2] * 5


def test_what_a_policy_said_that_is_no_more_holds_nobody_up(serve: Serve) -> None:
    """Serve's controller was killed meanwhile, or the model deployed anew."""
    ask_to_yield("sd")
    assert serve.asks(YieldWhenIdle(turn_s=0), replicas=1, requests=1) == 1
    assert gives_way("sd")
    another = YieldWhenIdle(turn_s=60)
    serve.now += GIVES_WAY_S
    ask_to_yield("sd")
    assert serve.asks(another, replicas=1, requests=1) == 1
    assert not gives_way("sd")


@pytest.mark.parametrize("arguments", [{"idle_sec": 3}, {"idle_s": "abc"}, {"idle_s": None}, {"turn_s": "abc"}])
def test_a_mistake_is_logged_and_the_default_stands(
    arguments: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    policy = YieldWhenIdle(**arguments)  # type: ignore[arg-type]
    assert (policy._idle_s, policy._turn_s) == (IDLE_S, TURN_S)
    assert next(iter(arguments)) in caplog.text


OUTSIDE = """
from remote_vae import RemoteVAE
from remote_vae.errors import UnknownModel
try:
    RemoteVAE.from_app("demo")
except UnknownModel as error:
    print(error)
"""


def test_a_process_outside_any_cluster_is_told_to_join_one() -> None:
    run = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True, check=True)
    assert "ray.init" in run.stdout
