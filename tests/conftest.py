"""What all tests share: one real Ray Serve, weights of tiny models, one thread for torch, and who runs beside whom.

Ray has four GPUs that are not there: it reserves and places as if they were.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
import torch
from diffusers.utils import logging
from ray import serve
from ray.serve import RunTarget

from limits import WAIT_S
from local_server import free_port
from remote_vae_serve.app import ingress, vae
from remote_vae_serve.config import IngressConfig, VAEConfig
from samples import KINDS, save_tiny_vae

# Serve kills a proxy that is not ready within 5 s, which on a busy machine none is. Read by Serve's controller.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
# Idle workers that wait for tasks: ours are replicas with an environment of their own, which never take one.
os.environ.setdefault("RAY_enable_worker_prestart", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
GPUS = 4
SERVED = ("sd", "sdxl", "flux", "hunyuan")
"""Kinds of tiny VAEs on the cluster: two of one shape, packed latents, video. In one process, all kinds are tried."""
PATHS = {"flux": "/direct"}
PLACEMENT_WAIT_S = 2.0
AT_ONCE = {"graceful_shutdown_wait_loop_s": 0.1}
"""Serve looks only every two seconds whether a replica that is to go has still work."""
RAYS_OF_THEIR_OWN = (
    "test_layers_below", "test_launcher", "test_shipped_config", "test_deploy", "test_demo", "test_sabotaged_launcher",
)  # fmt: skip
"""Files that start servers of their own, each with a Ray."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """For pytest-xdist's loadgroup: one process for all tests of a cluster, one for each other file or served family.

    What waits for Ray begins early, so that the rest fills the time beside it; but not all of it at once. In random order too.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group_of(item)))
    yield  # here xdist reads the groups, and others shuffle
    items.sort(key=_begun_at)  # stable: the order within stays


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """The Ray goes with the last test that needs it: its controller, replicas and agents take half a core, idle."""
    yield
    if nextitem is None or _cluster_of(nextitem) is None:
        _running.close()


def _group_of(item: pytest.Item) -> str:
    cluster = _cluster_of(item)
    if cluster is not None:
        return cluster
    served = getattr(item, "callspec", None) and item.callspec.params.get("served")
    return served.name if served else item.path.stem


def _begun_at(item: pytest.Item) -> int:
    cluster = _cluster_of(item)
    if cluster is not None:
        return ("cluster", "bare_cluster").index(cluster)
    if item.path.parent.name == "families":
        return 2
    return 3 if item.path.stem in RAYS_OF_THEIR_OWN else 4


def _cluster_of(item: pytest.Item) -> str | None:
    asked_for = getattr(item, "fixturenames", ())
    return next((name for name in ("cluster", "bare_cluster") if name in asked_for), None)


_running = ExitStack()
"""What ends the Ray of this process; empty where none runs."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread_for_fixtures() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums are the same bit for bit on both sides; and threads wait for each other longer than tiny convolutions take.

    Before each test: an engine that is loaded sets its own number for the process.
    """
    torch.set_num_threads(1)


@pytest.fixture
def quiet() -> Iterator[None]:
    """diffusers logs errors alone."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


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


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights for each kind of tiny VAE."""
    folder = tmp_path_factory.mktemp("weights")
    for kind in KINDS:
        save_tiny_vae(kind, folder / kind)
    return folder


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


@pytest.fixture(scope="session")
def bare_cluster(weights: Path) -> Iterator[Cluster]:
    """The ingress, and no model."""
    here = Path(__file__).parent
    # Workers unpickle the actors that tests define by importing the tests.
    paths = [
        here,
        here / "cluster",
        here / "serve",
        here.parent / "tools",
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    environment = pytest.MonkeyPatch()
    environment.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    _running.callback(environment.undo)
    _start_ray()
    _running.callback(ray.shutdown)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    _running.callback(serve.shutdown)
    serve.run(
        ingress(IngressConfig(max_body_mib=8, placement_wait_s=PLACEMENT_WAIT_S)), name="remote-vae", route_prefix="/"
    )
    yield Cluster(f"http://127.0.0.1:{port}", weights)
    _running.close()


@pytest.fixture(scope="session")
def cluster(bare_cluster: Cluster) -> Cluster:
    """With a model of each kind, one of them at a path of its own too.

    One thread on both sides and no company in a batch: results are compared bit for bit.
    """
    models = {
        kind: vae(VAEConfig(source=bare_cluster.source(kind), device="cpu", threads=1, batching="off", max_body_mib=1))
        for kind in SERVED
    }
    serve.run_many([RunTarget(model, name=kind, route_prefix=PATHS.get(kind)) for kind, model in models.items()])
    for kind in SERVED:
        bare_cluster.wait_for(kind, lambda model: model["state"] == "ready")
    return bare_cluster
