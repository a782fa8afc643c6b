"""Reservation and placement, with GPUs that Ray counts and nobody has."""

from __future__ import annotations

import ray
from ray import serve

from conftest import GPUS, Cluster
from remote_vae import RemoteVAE
from remote_vae_serve.app import gpus_of_a_replica
from remote_vae_serve.config import VAEConfig
from samples import latents


def test_each_replica_of_two_models_holds_one_gpu(bare_cluster: Cluster) -> None:
    names = ("first", "second")
    for name in names:
        bare_cluster.begin(name, source="x", fake={}, device="cpu", num_gpus=1, options={"num_replicas": 2})
    for name in names:
        bare_cluster.wait_for_replicas(name, 2)
        bare_cluster.wait_until_known(name)
    try:
        held: dict[str, set[int]] = {name: set() for name in names}
        for name in names:
            with RemoteVAE.from_app(name) as model:
                model.decode(latents(1, 4, 8, 8))
                for _ in range(40):  # the router picks a replica; both answer sooner or later
                    (gpu,) = model.describe()["gpu_ids"]
                    held[name].add(gpu)
        assert held["first"] | held["second"] == set(range(GPUS))
        assert not held["first"] & held["second"]
        assert ray.available_resources().get("GPU", 0) == 0
    finally:
        for name in names:
            serve.delete(name)


def test_auto_reserves_a_gpu_where_a_node_has_one_and_never_for_a_model_on_the_cpu(bare_cluster: Cluster) -> None:
    assert gpus_of_a_replica(VAEConfig(source="x")) == 1
    assert gpus_of_a_replica(VAEConfig(source="x", device="cpu")) == 0
    assert gpus_of_a_replica(VAEConfig(source="x", device="cpu", num_gpus=0.5)) == 0.5
