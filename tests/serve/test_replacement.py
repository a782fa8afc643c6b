"""Serve replaces a replica that fails its health check: meanwhile its clients are told to come again, and lose nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from ray import serve

from limits import WAIT_S, stretched
from remote_vae import RemoteVAE
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.replica.description import describe_arguments
from remote_vae_serve.replica.device_job import Job
from remote_vae_serve.replica.replica import VAE
from running_cluster import Cluster
from samples import latents

QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt"}
Z = latents(1, 4, 8, 8)
NAME = "breakable"
PERIOD_S = 0.5
CLIENTS = 3


class Breakable(VAE):
    """A replica whose device's thread can be told to end at the next job that it takes."""

    async def end_device(self) -> None:
        assert self._pipeline is not None
        self._pipeline._worker._take_with = _exit  # type: ignore[method-assign]


def _exit(first: Job) -> None:
    raise SystemExit


@pytest.fixture
def breakable(cluster: Cluster) -> Iterator[str]:
    config = VAEConfig(source="x", device="cpu", num_gpus=0, fake={"decode_s": 0.01})
    deployment = serve.deployment(
        serve.ingress()(Breakable),
        name="VAE",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=8,
        user_config=describe_arguments(config).to_plain(),
        health_check_period_s=PERIOD_S,
    )
    serve.run(deployment.bind(config), name=NAME, route_prefix=None)
    cluster.wait_for(NAME, lambda model: model["state"] == "ready")
    yield f"{cluster.url}/{NAME}"
    serve.delete(NAME)


@pytest.mark.slow
def test_a_replica_whose_device_has_ended_is_replaced_and_no_client_loses_a_decode(breakable: str) -> None:
    over = threading.Event()

    def decode_all_along() -> tuple[int, float]:
        """How many, and how long the longest took."""
        count, longest = 0, 0.0
        with RemoteVAE(breakable) as vae:
            while not over.is_set():
                began = time.monotonic()
                assert vae.decode(Z, output_type="pt").shape == (1, 3, 64, 64)
                count, longest = count + 1, max(longest, time.monotonic() - began)
        return count, longest

    def post() -> requests.Response:
        return requests.post(breakable, params=QUERY, data=Z.numpy().tobytes(), timeout=WAIT_S)

    with ThreadPoolExecutor(CLIENTS) as pool:
        try:
            clients = [pool.submit(decode_all_along) for _ in range(CLIENTS)]
            assert post().status_code == 200
            serve.get_app_handle(NAME).end_device.remote().result()
            ended, refused = time.monotonic(), []
            while (answer := post()).status_code != 200:
                assert time.monotonic() < ended + WAIT_S
                refused.append((answer.status_code, answer.json()["code"], int(answer.headers["retry-after"]) > 0))
                time.sleep(0.05)
            replaced_s = time.monotonic() - ended
            time.sleep(1.0)
        finally:
            over.set()
        counts, waits = zip(*(client.result(WAIT_S) for client in clients), strict=True)
    print(
        f"checked every {PERIOD_S} s: {len(refused)} times 503 in {replaced_s:.1f} s; clients waited {max(waits):.1f} s at most"
    )
    assert replaced_s < stretched(60)
    assert set(refused) == {(503, "unavailable", True)}
    assert min(counts) > 1
