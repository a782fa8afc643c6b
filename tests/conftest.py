"""What all tests share: one real Ray Serve, weights of tiny models, one thread for torch, and who runs beside whom.

Torch, diffusers and Ray are imported where they are used: of several processes the one that hands out the tests runs none.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from running_cluster import Cluster

# Ray's workers give way to all other work: beside some, a replica would take minutes to start.
os.environ.setdefault("RAY_worker_niceness", "0")
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


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need look at its million objects again."""
    gc.collect()
    gc.freeze()


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
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums are the same bit for bit on both sides; and threads wait for each other longer than tiny convolutions take.

    Before each test: an engine that is loaded sets its own number for the process.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def quiet() -> Iterator[None]:
    """diffusers logs errors alone."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights for each kind of tiny VAE."""
    from samples import KINDS, save_tiny_vae

    folder = tmp_path_factory.mktemp("weights")
    for kind in KINDS:
        save_tiny_vae(kind, folder / kind)
    return folder


@pytest.fixture(scope="session")
def bare_cluster(weights: Path) -> Iterator[Cluster]:
    """The ingress, and no model."""
    from running_cluster import start_ingress

    yield start_ingress(weights, _running)
    _running.close()


@pytest.fixture(scope="session")
def cluster(bare_cluster: Cluster) -> Cluster:
    """With a model of each kind, one of them at a path of its own too."""
    from running_cluster import start_models

    start_models(bare_cluster)
    return bare_cluster
