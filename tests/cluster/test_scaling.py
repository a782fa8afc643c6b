"""Replicas that come and go: one GPU and two models, a load that grows and ends, models added and removed, a full queue."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import requests
from ray import serve
from ray.serve.context import _get_global_client

from limits import WAIT_S, stretched
from remote_vae import RemoteVAE
from remote_vae.errors import Overloaded, TimedOut
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.tensors import from_array
from running_cluster import GPUS, Cluster
from samples import latents

FAKE = {"decode_s": 1.0, "seconds_per_megapixel": 1.0}
LONG_S = 20
"""The latents say how long a decode takes."""
# As in serve_config.yaml, but in seconds where it has minutes.
QUICK: dict[str, Any] = {
    "autoscaling_config": {
        "min_replicas": 0,
        "max_replicas": 2,
        "target_ongoing_requests": 1,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 1,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1,
        "downscale_to_zero_delay_s": 1,
        "policy": {"policy_function": "remote_vae_serve.scaling:YieldWhenIdle", "policy_kwargs": {"idle_s": 600}},
    },
}


def patient(idle_s: float, max_replicas: int = 1, turn_s: float = 600) -> dict[str, Any]:
    """`QUICK` with another idle time, size and length of a turn."""
    policy = QUICK["autoscaling_config"]["policy"] | {"policy_kwargs": {"idle_s": idle_s, "turn_s": turn_s}}
    return QUICK | {
        "autoscaling_config": QUICK["autoscaling_config"] | {"policy": policy, "max_replicas": max_replicas}
    }


def post(cluster: Cluster, name: str, megapixels: int = 0, timeout_s: float = WAIT_S) -> requests.Response:
    z = latents(1, 4, 128 * megapixels, 128) if megapixels else latents(1, 4, 8, 8)
    query = {"shape": list(z.shape), "dtype": "float32"}
    return requests.post(f"{cluster.url}/{name}", params=query, data=z.numpy().tobytes(), timeout=timeout_s)


def post_until_served(cluster: Cluster, name: str) -> requests.Response:
    """The first answer that is not `come again`."""
    give_up = time.monotonic() + WAIT_S
    while (answer := post(cluster, name)).status_code == 503 and time.monotonic() < give_up:
        time.sleep(0.5)
    return answer


def until_busy(name: str) -> None:
    """Until the replica has long work to do: what may be rejected is decoded before, and rejected then."""
    short = DecodeRequest(from_array(latents(1, 4, 8, 8))).to_plain()
    give_up = time.monotonic() + WAIT_S
    while len(serve.get_app_handle(name).decode.remote(short, handed_back=()).result()) != 2:
        assert time.monotonic() < give_up


@pytest.fixture
def all_gpus_but_one() -> Iterator[None]:
    """Somebody else holds the other GPUs."""

    @ray.remote(num_gpus=GPUS - 1, num_cpus=0)
    class Holder:
        def ready(self) -> None: ...

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    yield
    ray.kill(holder)


@pytest.fixture(scope="module")
def slow(bare_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started side by side: `slow`, `narrow` with a short queue, and `hopeless`, whose weights are not there."""
    on_cpu: dict[str, Any] = {"source": "x", "fake": FAKE, "num_gpus": 0, "device": "cpu"}
    bare_cluster.begin("slow", **on_cpu)
    bare_cluster.begin("narrow", **on_cpu, options={"max_ongoing_requests": 1, "max_queued_requests": 2})
    bare_cluster.begin(
        "hopeless", source=str(tmp_path_factory.mktemp("nothing")), device="cpu", num_gpus=0, retry_s=600
    )
    for name in ("slow", "narrow", "hopeless"):
        bare_cluster.wait_until_known(name)
    yield bare_cluster
    for name in ("slow", "narrow", "hopeless"):
        serve.delete(name, _blocking=False)


def test_one_gpu_two_models(bare_cluster: Cluster, all_gpus_but_one: None) -> None:
    """The second hears what it waits for and who holds it while that is so; when the first is idle, it lets go at once."""
    released = threading.Event()

    def keep_busy() -> None:
        while not released.is_set():
            assert post(bare_cluster, "holder").status_code == 200

    for name, seconds in (("holder", 1.0), ("waiter", 0.0)):
        bare_cluster.deploy(
            name, source="x", device="cpu", num_gpus=1, fake={"decode_s": seconds}, options=patient(600)
        )
    try:
        assert post_until_served(bare_cluster, "holder").status_code == 200
        busy = [threading.Thread(target=keep_busy) for _ in range(2)]  # so that one is always there
        for client in busy:
            client.start()
        refused = post(bare_cluster, "waiter")
        assert (refused.status_code, refused.json()["code"]) == (503, "model_starting")
        assert int(refused.headers["retry-after"]) > 0
        assert "waits for 1 GPU; holder holds it" in refused.json()["error"]
        described = bare_cluster.wait_for("waiter", lambda model: "reason" in model)
        assert described["state"] == "starting"
        assert "holder holds it" in described["reason"]
        released.set()
        for client in busy:
            client.join()
        assert post_until_served(bare_cluster, "waiter").status_code == 200
        bare_cluster.wait_for("holder", lambda model: model["state"] == "cold")
    finally:
        released.set()
        serve.delete("holder")
        serve.delete("waiter")


@pytest.mark.slow
def test_two_busy_models_take_turns_at_one_gpu(bare_cluster: Cluster, all_gpus_but_one: None) -> None:
    names, served, stop = ("left", "right"), dict[str, list[float]](), threading.Event()

    def keep_asking(name: str) -> None:
        with RemoteVAE(f"{bare_cluster.url}/{name}", deadline=WAIT_S) as vae:
            while not stop.is_set():
                vae.decode(latents(1, 4, 8, 8))
                served[name].append(time.monotonic())

    for name in names:
        served[name] = []
        options = patient(600, turn_s=3)
        bare_cluster.deploy(name, source="x", device="cpu", num_gpus=1, fake={"decode_s": 0.3}, options=options)
    try:
        with ThreadPoolExecutor(4) as clients:
            asking = [clients.submit(keep_asking, name) for name in names for _ in range(2)]
            give_up = time.monotonic() + WAIT_S
            while turns(served) < 4 and time.monotonic() < give_up and not any(client.done() for client in asking):
                time.sleep(0.5)
            stop.set()
        for client in asking:
            client.result()  # nobody was refused for good
        assert turns(served) >= 4
    finally:
        stop.set()
        for name in names:
            serve.delete(name)


def turns(served: dict[str, list[float]]) -> int:
    """How often another model than the last one was served."""
    who = [name for _, name in sorted((when, name) for name, times in served.items() for when in times)]
    return sum(one != other for one, other in itertools.pairwise(who))


@pytest.mark.slow  # the autoscaler's own looks and delays
def test_replicas_follow_the_load_up_and_down_to_none(bare_cluster: Cluster) -> None:
    bare_cluster.deploy("elastic", source="x", fake={"decode_s": 0.3}, num_gpus=0, device="cpu", options=patient(1, 2))
    try:
        assert bare_cluster.wait_for("elastic", lambda model: True)["state"] == "cold"
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                assert post(bare_cluster, "elastic").status_code == 200

        with ThreadPoolExecutor(6) as clients:
            loads = [clients.submit(load) for _ in range(6)]
            bare_cluster.wait_for_replicas("elastic", 2)
            stop.set()
            for done in loads:
                done.result()
        bare_cluster.wait_for_replicas("elastic", 0)
        bare_cluster.wait_for("elastic", lambda model: model["state"] == "cold")
    finally:
        serve.delete("elastic")


def test_a_get_wakes_nobody(bare_cluster: Cluster) -> None:
    bare_cluster.deploy("asleep", source="x", fake={}, num_gpus=0, device="cpu", options=QUICK)
    try:
        for _ in range(5):
            assert requests.get(f"{bare_cluster.url}/asleep").json()["state"] == "cold"
            assert requests.get(f"{bare_cluster.url}/models").ok
            time.sleep(0.5)
        assert bare_cluster.replicas("asleep") == 0
    finally:
        serve.delete("asleep")


def test_a_full_queue_is_said_and_nothing_is_lost(slow: Cluster) -> None:
    with RemoteVAE(f"{slow.url}/narrow", workers=12, retries=0) as vae:
        futures = [vae.submit(latents(1, 4, 8, 8)) for _ in range(12)]
        errors = [future.exception() for future in futures]
    refused = [error for error in errors if error is not None]
    assert all(isinstance(error, Overloaded) and error.retry_after for error in refused)
    assert 1 <= len(refused) < 12


def test_a_client_that_leaves_does_not_hold_up_the_next(slow: Cluster) -> None:
    for _ in range(6):
        with pytest.raises(requests.Timeout):
            post(slow, "slow", timeout_s=0.3)
    started = time.monotonic()
    assert post(slow, "slow").status_code == 200
    # One decode that could not be stopped and our own: those that were still waiting were dropped.
    assert time.monotonic() - started < stretched(4.5)


def test_a_handle_call_that_times_out_leaves_the_queue(slow: Cluster) -> None:
    with RemoteVAE.from_app("slow", timeout=0.3) as hasty:
        for _ in range(6):
            with pytest.raises(TimedOut):
                hasty.decode(latents(1, 4, 8, 8))
    started = time.monotonic()
    with RemoteVAE.from_app("slow") as patient_one:
        patient_one.decode(latents(1, 4, 8, 8))
    assert time.monotonic() - started < stretched(4.5)


def test_a_replica_that_is_killed_in_the_middle_is_a_503_and_the_next_request_is_served(slow: Cluster) -> None:
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(post, slow, "slow", LONG_S)
        until_busy("slow")
        (replica,) = _get_global_client().get_serve_details()["applications"]["slow"]["deployments"]["VAE"]["replicas"]
        os.kill(replica["pid"], signal.SIGKILL)
        died = answer.result()
    assert (died.status_code, died.json()["code"]) == (503, "unavailable")
    assert died.headers["retry-after"]
    assert post_until_served(slow, "slow").status_code == 200


def test_states_outlive_the_ingress(slow: Cluster) -> None:
    slow.wait_for("hopeless", lambda model: model["state"] == "failed")
    details = _get_global_client().get_serve_details()["applications"]["remote-vae"]["deployments"]["Ingress"]
    os.kill(details["replicas"][0]["pid"], signal.SIGKILL)
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        with contextlib.suppress(requests.RequestException, ValueError):
            if requests.get(f"{slow.url}/health", timeout=5).json()["models"]:
                break
        time.sleep(0.3)
    assert slow.wait_for("hopeless", lambda _: True)["state"] == "failed"
    assert "latents" in slow.wait_for("slow", lambda _: True)
