"""Contract tests of what we lean on in Ray and Serve without a promise, asked of a Serve that runs.

What can be asked of the installed Ray without starting it is in tests/unit/test_ray_internals.py.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import ray
import torch
from ray import serve

from limits import WAIT_S
from remote_vae import RemoteVAE, ray_internals
from remote_vae.errors import BadRequest, InternalError
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array
from remote_vae.transports.call_size import FITS, CallSize
from remote_vae.transports.handle import HandleTransport, translated
from remote_vae_serve.scaling import ask_to_yield, asked_to_yield
from running_cluster import Cluster
from samples import latents, pipeline_decode, tiny_vae


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


def test_a_small_call_by_value_is_answered_like_one_by_reference(cluster: Cluster) -> None:
    handle = serve.get_app_handle("sd")
    plain = DecodeRequest(from_array(latents(1, 4, 8, 8).numpy()), output=Output.PT).to_plain()
    by_value, by_reference = (
        Result.from_plain(way(handle).decode.remote(plain).result(timeout_s=WAIT_S)).tensor.data
        for way in (ray_internals.by_value, ray_internals.by_reference)
    )
    assert np.array_equal(by_value, by_reference)
    with pytest.raises(BadRequest) as refused:  # as itself, so that its parameter reaches the client
        raise translated(
            _error_of(ray_internals.by_value(handle).decode.remote((*plain[:3], (1, 7, 8, 8), *plain[4:])))
        )
    assert refused.value.parameter == "shape"


def _error_of(response: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever Serve makes of it
        response.result(timeout_s=WAIT_S)
    return caught.value


def test_a_message_holds_what_is_sent_in_one_and_no_large_reply(cluster: Cluster) -> None:
    """What is larger has to go by reference; once something was, the model is asked anew for the size of its replies."""
    transport = HandleTransport.of_app("sd")
    transport._sizes, large = CallSize(0.0), DecodeRequest(from_array(latents(1, 4, 96, 96).numpy()), output=Output.PT)
    with pytest.raises(InternalError):
        transport.send_one(large)
    assert transport._sizes is None
    assert transport.send_one(large).shape == (1, 3, 768, 768)
    transport._sizes, fits = CallSize(0.0), DecodeRequest(from_array(latents(1, 4, 50, 50).numpy()), output=Output.PT)
    result = transport.send_one(fits)
    assert FITS * 0.9 < result.tensor.data.nbytes <= FITS


def test_our_transport_chooses_by_size_and_everybody_gets_the_same(cluster: Cluster) -> None:
    transport = HandleTransport.of_app("sd")
    by_value, by_reference = Counting(transport._by_value), Counting(transport._handle)
    transport._by_value, transport._handle = by_value, by_reference
    expected = pipeline_decode(tiny_vae("sd"), latents(1, 4, 8, 8))
    with RemoteVAE(transport) as vae:
        for _ in range(3):
            assert torch.equal(vae.decode(latents(1, 4, 8, 8), output_type="pt"), expected)
        assert by_reference.calls == ["decode"], "the first says that the model is there"
        assert by_value.calls == ["describe", "decode", "decode"]
        vae.decode(latents(1, 4, 64, 64), output_type="pt")
        vae.decode(latents(1, 4, 8, 8), output_type="pt", as_ref=True)
        assert by_reference.calls == ["decode"] * 3


class Counting:
    """A handle, and the names of the methods that were called by it."""

    def __init__(self, handle: Any) -> None:
        self._wrapped, self.calls = handle, list[str]()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._wrapped, name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return method.remote(*arguments)

        return SimpleNamespace(remote=call)


def test_what_one_process_writes_into_the_store_another_reads(cluster: Cluster) -> None:
    @ray.remote(num_cpus=0)
    def elsewhere(name: str) -> bool:
        return asked_to_yield(name)

    assert not ray.get(elsewhere.remote("contract"))
    ask_to_yield("contract")
    assert ray.get(elsewhere.remote("contract")), "an idle model never gives up its GPU to one that waits"
