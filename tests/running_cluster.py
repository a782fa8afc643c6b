"""One real Ray Serve with our ingress and a model of each kind, as the tests of a session share it.

Ray has four GPUs that are not there: it reserves and places as if they were.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
from ray import serve
from ray.serve import RunTarget

from limits import WAIT_S
from local_server import free_port
from remote_vae_serve.app import ingress, vae
from remote_vae_serve.config import IngressConfig, VAEConfig

# Serve kills a proxy that is not ready within 5 s, which on a busy machine none is. Read by Serve's controller.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
# Idle workers that wait for tasks: ours are replicas with an environment of their own, which never take one.
os.environ.setdefault("RAY_enable_worker_prestart", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
GPUS = 4
SERVED = ("sd", "sdxl", "flux", "hunyuan")
"""Kinds of tiny VAEs on the cluster: two of one shape, packed latents, video. In one process, all kinds are tried."""
PATHS = {"flux": "/direct"}
PAGE = "https://page.example"
"""The origin whose pages may use the cluster."""
PLACEMENT_WAIT_S = 2.0
AT_ONCE = {"graceful_shutdown_wait_loop_s": 0.1}
"""Serve looks only every two seconds whether a replica that is to go has still work."""


@dataclass(frozen=True)
class Cluster:
    """The running service: its address, and one application for each kind of tiny VAE."""

    url: str
    weights: Path

    def source(self, kind: str) -> str:
        return str(self.weights / kind)

    def deploy(self, name: str, **arguments: Any) -> None:
        """Deploy a model and wait until the ingress knows it."""
        self.begin(name, **arguments)
        self.wait_until_known(name)

    def begin(self, name: str, **arguments: Any) -> None:
        """Deploy a model and wait for nothing."""
        options = AT_ONCE | arguments.pop("options", {})
        application = vae(VAEConfig(**arguments))._bound_deployment.options(**options).bind(VAEConfig(**arguments))
        serve.run_many([RunTarget(application, name=name, route_prefix=None)], wait_for_applications_running=False)

    def wait_until_known(self, name: str) -> None:
        known = ("ready", "failed", "cold")
        self.wait_for(name, lambda model: model["state"] in known)

    def replicas(self, name: str) -> int:
        """How many replicas of the model run."""
        running = serve.status().applications[name].deployments["VAE"].replica_states
        return int(running.get("RUNNING", 0))

    def wait_for_replicas(self, name: str, count: int, timeout_s: float = WAIT_S) -> None:
        give_up = time.monotonic() + timeout_s
        while self.replicas(name) != count:
            assert time.monotonic() < give_up, f"{name} has {self.replicas(name)} replicas, not {count}"
            time.sleep(0.2)

    def wait_for(
        self, name: str, condition: Callable[[dict[str, Any]], bool], timeout_s: float = WAIT_S
    ) -> dict[str, Any]:
        """The model's description once it fulfils the condition."""
        give_up = time.monotonic() + timeout_s
        while True:
            answer = requests.get(f"{self.url}/{name}", timeout=60)
            if answer.ok and condition(answer.json()):
                return dict(answer.json())
            assert time.monotonic() < give_up, f"{name} did not get there: {answer.text}"
            time.sleep(0.2)


def start_ingress(weights: Path, at_the_end: ExitStack) -> Cluster:
    """A Ray with the ingress and no model; what ends it is left `at_the_end`."""
    here = Path(__file__).parent
    # Workers unpickle the actors that tests define by importing the tests.
    asked_for = filter(None, [os.environ.get("PYTHONPATH")])
    paths = [here, here / "cluster", here / "serve", here.parent / "tools", *asked_for]
    environment = pytest.MonkeyPatch()
    environment.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    at_the_end.callback(environment.undo)
    # Threads of Ray's outlive it, and its handler writes to whatever stderr is then: that which another test reads.
    logging.getLogger("ray").handlers.clear()
    _start_ray()
    at_the_end.callback(ray.shutdown)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    at_the_end.callback(serve.shutdown)
    config = IngressConfig(max_body_mib=8, placement_wait_s=PLACEMENT_WAIT_S, allow_origins=(PAGE,))
    serve.run(ingress(config), name="remote-vae", route_prefix="/")
    return Cluster(f"http://127.0.0.1:{port}", weights)


def start_models(cluster: Cluster) -> None:
    """A model of each kind, one of them at a path of its own too.

    Eager in float32, one thread on both sides and no company in a batch: results are compared bit for bit.
    """
    exact: dict[str, Any] = {"device": "cpu", "engine": "eager", "dtype": "float32", "threads": 1, "batching": "off"}
    models = {
        kind: vae(VAEConfig(source=cluster.source(kind), max_body_mib=1, allow_origins=(PAGE,), **exact))
        for kind in SERVED
    }
    serve.run_many([RunTarget(model, name=kind, route_prefix=PATHS.get(kind)) for kind, model in models.items()])
    for kind in SERVED:
        cluster.wait_for(kind, lambda model: model["state"] == "ready")


def _start_ray(tries: int = 3) -> None:
    """Ray gives a node 30 s to come up, which no setting changes; beside other work it may take longer once."""
    try:
        ray.init(
            "local", num_cpus=4, num_gpus=GPUS, include_dashboard=False, log_to_driver=False, configure_logging=False
        )
    except Exception:
        if tries == 1:
            raise
        ray.shutdown()
        _start_ray(tries - 1)
