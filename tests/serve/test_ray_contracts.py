"""Contract tests of what we lean on in Ray and Serve without a promise, asked of a Serve that runs.

What can be asked of the installed Ray without starting it is in tests/unit/test_ray_internals.py.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import serve

from remote_vae import ray_internals
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.scaling import ask_to_yield, asked_to_yield
from running_cluster import Cluster
from samples import latents


def decoded(cluster: Cluster) -> Any:
    """The response to a decode by a handle."""
    request = DecodeRequest(from_array(latents(1, 4, 8, 8).numpy()))
    return ray_internals.by_reference(serve.get_app_handle("sd")).decode.remote(request.to_plain())


def test_the_details_say_what_the_ingress_reads(cluster: Cluster) -> None:
    details = ray_internals.serve_details()
    application = details["applications"]["sd"]
    assert str(application["status"]).endswith("RUNNING"), "states of models are wrong at GET /models"
    deployment = application["deployments"]["VAE"]
    assert deployment["deployment_config"]["user_config"]["protocol"], "the ingress takes every model for a stranger's"
    assert deployment["target_num_replicas"] == 1
    assert "CPU" in deployment["required_resources"], "clients are not told what their model waits for"
    (replica,) = deployment["replicas"]
    assert str(replica["state"]).endswith("RUNNING"), (
        "every model looks cold, and its replicas are never asked to describe it"
    )
    assert replica["replica_id"]


def test_the_proxy_is_among_those_who_answer_http(cluster: Cluster) -> None:
    ports = {target.port for target in ray_internals.http_targets()}
    assert ports == {urlsplit(cluster.url).port}, "the probe at the start asks nobody, or the wrong ones"


def test_a_reference_comes_of_a_response_waited_for_either_way(cluster: Cluster) -> None:
    blocking = ray.get(ray_internals.reference_of(decoded(cluster), 60))
    assert isinstance(blocking, tuple), "`as_ref=True` of the client gives something else than a result"
    assert Result.from_plain(blocking).to_plain()

    async def awaited() -> Any:
        return await ray_internals.reference_of_async(decoded(cluster))

    assert Result.from_plain(ray.get(asyncio.run(awaited()))).to_plain()


def test_what_one_process_writes_into_the_store_another_reads(cluster: Cluster) -> None:
    @ray.remote(num_cpus=0)
    def elsewhere(name: str) -> bool:
        return asked_to_yield(name)

    assert not ray.get(elsewhere.remote("contract"))
    ask_to_yield("contract")
    assert ray.get(elsewhere.remote("contract")), "an idle model never gives up its GPU to one that waits"
