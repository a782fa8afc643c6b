"""One real Ray Serve for the whole run, with four GPUs that are not there: Ray reserves and places as if they were."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
from ray import serve
from ray.serve import RunTarget

from local_server import free_port
from remote_vae_serve.app import ingress, vae
from remote_vae_serve.config import IngressConfig, VAEConfig
from samples import KINDS, save_tiny_vae

GPUS = 4


@dataclass(frozen=True)
class Cluster:
    """The running service: its address, and one application for each kind of tiny VAE."""

    url: str
    weights: Path

    def source(self, kind: str) -> str:
        return str(self.weights / kind)

    def deploy(self, name: str, **arguments: Any) -> None:
        """Deploy a model and wait until the ingress knows it."""
        options = arguments.pop("options", {})
        application = vae(VAEConfig(**arguments))
        if options:
            application = application._bound_deployment.options(**options).bind(VAEConfig(**arguments))
        serve.run(application, name=name, route_prefix=None)
        self.wait_for(name, lambda model: model["state"] in ("ready", "failed", "cold"))

    def replicas(self, name: str) -> int:
        """How many replicas of the model run."""
        running = serve.status().applications[name].deployments["VAE"].replica_states
        return int(running.get("RUNNING", 0))

    def wait_for_replicas(self, name: str, count: int, timeout_s: float = 60) -> None:
        give_up = time.monotonic() + timeout_s
        while self.replicas(name) != count:
            assert time.monotonic() < give_up, f"{name} has {self.replicas(name)} replicas, not {count}"
            time.sleep(0.2)

    def wait_for(self, name: str, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 60) -> dict[str, Any]:
        """The model's description once it fulfils the condition."""
        give_up = time.monotonic() + timeout_s
        while True:
            answer = requests.get(f"{self.url}/{name}", timeout=10)
            if answer.ok and condition(answer.json()):
                return dict(answer.json())
            assert time.monotonic() < give_up, f"{name} did not get there: {answer.text}"
            time.sleep(0.2)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights for each kind of tiny VAE."""
    folder = tmp_path_factory.mktemp("weights")
    for kind in KINDS:
        save_tiny_vae(kind, folder / kind)
    return folder


@pytest.fixture(scope="session")
def cluster(weights: Path) -> Iterator[Cluster]:
    here = Path(__file__).parent
    # Workers unpickle the actors that tests define by importing the tests.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        map(str, [here, here / "cluster", here / "serve", here.parent / "tools"])
    )
    ray.init("local", num_cpus=4, num_gpus=GPUS, include_dashboard=False, log_to_driver=False, configure_logging=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    running = Cluster(f"http://127.0.0.1:{port}", weights)
    # One thread on both sides and no company in a batch, so that results can be compared bit for bit.
    models = {
        kind: vae(VAEConfig(source=running.source(kind), device="cpu", threads=1, batching="off")) for kind in KINDS
    }
    targets = [RunTarget(model, name=kind, route_prefix=None) for kind, model in models.items()]
    serve.run_many([RunTarget(ingress(IngressConfig(max_body_mib=8)), name="remote-vae", route_prefix="/"), *targets])
    for kind in KINDS:
        running.wait_for(kind, lambda model: model["state"] == "ready")
    yield running
    serve.shutdown()
    ray.shutdown()
