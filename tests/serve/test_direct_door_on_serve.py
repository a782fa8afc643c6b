"""A model with a path of its own in the config answers there itself, and goes on answering through the ingress's handle."""

from __future__ import annotations

import pytest
import requests
import torch

from limits import WAIT_S
from remote_vae import RemoteVAE
from running_cluster import PAGE, PATHS, Cluster
from samples import latents, pipeline_decode, tiny_vae


@pytest.fixture(scope="module")
def direct(cluster: Cluster) -> str:
    return cluster.url + PATHS["flux"]


@pytest.mark.parametrize("path", ["", "/", "/decode", "/decode/"])
def test_it_decodes_exactly_and_redirects_nobody(direct: str, path: str) -> None:
    z = latents(1, 16, 8, 8)
    answer = requests.post(
        direct + path,
        params={"shape": list(z.shape), "dtype": "float32", "do_scaling": "True", "output_type": "pt"},
        data=z.numpy().tobytes(),
        timeout=WAIT_S,
        allow_redirects=False,
    )
    assert (answer.status_code, answer.headers["x-vae-model"]) == (200, "flux")
    expected = pipeline_decode(tiny_vae("flux"), z)
    assert torch.equal(
        torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(expected.shape), expected
    )


def test_its_handle_is_there_as_well(direct: str) -> None:
    z = latents(1, 16, 8, 8)
    with RemoteVAE(direct) as url, RemoteVAE.from_app("flux") as handle:
        assert torch.equal(url.decode(z, output_type="pt"), handle.decode(z, output_type="pt"))
        assert url.describe()["state"] == url.describe(wake=True)["state"] == handle.describe()["state"] == "ready"


def test_errors_and_limits_are_those_of_the_ingress(direct: str) -> None:
    wrong = requests.post(direct, params={"shape": [1, 16, 8, 8], "dtype": "float32"}, data=b"short", timeout=WAIT_S)
    assert (wrong.status_code, wrong.json()["parameter"]) == (400, "shape")
    assert requests.post(direct, data=bytes(2**20 + 1), timeout=WAIT_S).status_code == 413
    assert requests.get(f"{direct}/encode", timeout=WAIT_S).json()["code"] == "wrong_method"


@pytest.mark.parametrize("path", ["/flux", PATHS["flux"]], ids=["by way of the ingress", "at its own path"])
def test_an_allowed_page_decodes_at_either_door_and_a_foreign_one_does_not(cluster: Cluster, path: str) -> None:
    def post(origin: str, body: bytes = latents(1, 16, 8, 8).numpy().tobytes()) -> requests.Response:
        query = {"shape": [1, 16, 8, 8], "dtype": "float32"}
        return requests.post(cluster.url + path, params=query, data=body, headers={"origin": origin}, timeout=WAIT_S)

    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = requests.options(cluster.url + path, headers=asked, timeout=WAIT_S)
    assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (200, "authorization")
    for answer, status in ((post(PAGE), 200), (post(PAGE, b"short"), 400)):
        assert (answer.status_code, answer.headers["x-vae-model"]) == (status, "flux")
        assert (answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (PAGE, "Origin")
    for origin in ("https://other.example", "null"):
        refused = post(origin)
        assert (refused.status_code, refused.json()["code"], refused.json()["parameter"]) == (
            403,
            "forbidden",
            "origin",
        )
    assert post(cluster.url).status_code == 200
