"""The ingress on real Serve: which applications it serves, what it says of them, and that bad requests disturb nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from ray import serve
from ray.serve import RunTarget

from js_client import check_in_node, needs_node
from limits import WAIT_S, stretched
from raw_http import exchange
from remote_vae import RemoteVAE
from remote_vae.errors import ModelFailed, UnknownModel
from running_cluster import SERVED, Cluster
from samples import latents, tiny_vae

QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt"}
CLIP = QUERY | {"shape": [1, 4, 1, 8, 8], "output_type": "mp4"}
BODY = latents(1, 4, 8, 8).numpy().tobytes()
MODELS = ("fake", "pickled", "mended")


@serve.deployment(name="VAE", ray_actor_options={"num_cpus": 0.1})
class Stranger:
    """Somebody else's application; its deployment even has our name."""

    def decode(self, plain: Any) -> Any:
        return plain

    def reconfigure(self, user_config: Any) -> None: ...


@pytest.fixture(scope="module")
def later(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Applications that came after the ingress, side by side: strangers, a fake engine, weights that cannot be loaded."""
    folders = {name: tmp_path_factory.mktemp(name) / "weights" for name in ("pickled", "mended")}
    tiny_vae("sd").save_pretrained(folders["pickled"], safe_serialization=False)
    strangers = {"stranger": Stranger.bind(), "future": Stranger.options(user_config={"protocol": 99}).bind()}
    targets = [RunTarget(application, name=name, route_prefix=None) for name, application in strangers.items()]
    serve.run_many(targets, wait_for_applications_running=False)
    cluster.begin("fake", source="nowhere", fake={"decode_s": 0.3})
    cluster.begin("pickled", source=str(folders["pickled"]), device="cpu", retry_s=600)
    cluster.begin("mended", source=str(folders["mended"]), device="cpu", retry_s=0.1)
    for name in MODELS:
        cluster.wait_until_known(name)
    yield folders
    for name in (*MODELS, *strangers):
        serve.delete(name, _blocking=False)


def test_models_lists_every_vae_application_and_nothing_else(cluster: Cluster, later: dict[str, Path]) -> None:
    names = {model["name"] for model in requests.get(f"{cluster.url}/models").json()["models"]}
    assert names - {"fake"} == {*SERVED, "pickled", "mended"}  # fake is deleted by a test
    for name in ("stranger", "future", "remote-vae"):
        answer = requests.post(f"{cluster.url}/{name}", params=QUERY, data=BODY)
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")
        assert "sd" in answer.json()["error"]


def test_health_answers_and_a_get_describes(cluster: Cluster) -> None:
    assert requests.get(f"{cluster.url}/health").json()["status"] == "ok"
    for spelling in ("sdxl", "sdxl/"):
        description = requests.get(f"{cluster.url}/{spelling}", allow_redirects=False).json()
        assert description["state"] == "ready"
        assert description["class"] == "AutoencoderKL"
        assert description["num_gpus"] == 0


def test_every_answer_says_who_made_it_and_how_long_it_took(cluster: Cluster) -> None:
    headers = requests.post(f"{cluster.url}/sd", params=QUERY, data=BODY).headers
    assert (headers["x-vae-model"], headers["x-vae-dtype"]) == ("sd", "float32")
    assert len(headers["x-request-id"].split(",")) == 1
    for stage in ("queue", "decode", "encode"):
        assert f"{stage};dur=" in headers["server-timing"]


BAD = {
    "wrong byte count": ("POST", "sd", QUERY, BODY[:-1], 400, "shape"),
    "unknown dtype": ("POST", "sd", QUERY | {"dtype": "float8"}, BODY, 400, "dtype"),
    "overflowing shape": ("POST", "sd", QUERY | {"shape": [2**40, 2**40, 2**40]}, BODY, 400, "shape"),
    "wrong channels": ("POST", "sdxl", QUERY | {"shape": [1, 8, 4, 8]}, BODY, 400, "shape"),
    "packed without a size": ("POST", "flux", QUERY | {"shape": [1, 4, 64]}, BODY, 400, "height"),
    "packed with a wrong size": (
        "POST",
        "flux",
        QUERY | {"shape": [1, 4, 64], "height": 8, "width": 8},
        BODY,
        400,
        "height",
    ),
    "mp4 of an image": ("POST", "sd", QUERY | {"output_type": "mp4"}, BODY, 400, "output_type"),
    "a batch for one image": ("POST", "sd", QUERY | {"shape": [2, 4, 4, 8], "output_type": "pil"}, BODY, 400, "shape"),
    "a picture of a video": (
        "POST",
        "hunyuan",
        CLIP | {"output_type": "pil"},
        BODY,
        400,
        "output_type",
    ),
    "an image to a video model": ("POST", "hunyuan", QUERY | {"output_type": "mp4"}, BODY, 400, "shape"),
    "two videos in one mp4": (
        "POST",
        "hunyuan",
        CLIP | {"shape": [2, 4, 1, 4, 8]},
        BODY,
        400,
        "shape",
    ),
    "no frames": ("POST", "hunyuan", CLIP | {"shape": [1, 4, 0, 8, 8]}, b"", 400, "shape"),
    "fps of zero": (
        "POST",
        "hunyuan",
        CLIP | {"fps": 0},
        BODY,
        400,
        "fps",
    ),
    "fps of a thousand": (
        "POST",
        "hunyuan",
        CLIP | {"fps": 1000},
        BODY,
        400,
        "fps",
    ),
    "zero factor": ("POST", "sd", QUERY | {"scaling_factor": 0}, BODY, 400, "scaling_factor"),
    "nan latents": ("POST", "sd", QUERY, torch.full((1, 4, 8, 8), torch.nan).numpy().tobytes(), 400, "tensor"),
    "unknown model": ("POST", "nope", QUERY, BODY, 404, "model"),
    "climbing path": ("POST", "..%2f..%2fetc%2fpasswd", QUERY, BODY, 404, None),
    "wrong method": ("DELETE", "sd", {}, b"", 405, None),
    "too large": ("POST", "sd", QUERY, bytes(9 * 2**20), 413, "body"),
    "form body": ("POST", "sd", QUERY, {"a": "b"}, 415, "content-type"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_what_is_wrong_and_the_next_one_is_served(cluster: Cluster, case: str) -> None:
    method, path, query, body, status, parameter = BAD[case]
    answer = requests.request(method, f"{cluster.url}/{path}", params=query, data=body, timeout=WAIT_S)
    fields = answer.json()
    assert answer.status_code == status, fields
    assert fields.get("parameter") == parameter
    assert fields["request_id"] == answer.headers["x-request-id"]
    assert fields["error"]
    good = requests.post(f"{cluster.url}/sd", params=QUERY, data=BODY, timeout=WAIT_S)
    assert good.status_code == 200


def test_a_large_body_that_does_not_fit_the_model_is_refused_before_it_comes(cluster: Cluster) -> None:
    """The ingress asks a replica, which alone knows that its latents have 4 channels."""
    head = "POST /sd?shape=1,7,300,300&dtype=float32 HTTP/1.1\r\nHost: x\r\nContent-Length: 2520000\r\n\r\n"
    answer = exchange(cluster.url, head.encode())
    assert answer.fields is not None, answer
    assert (answer.status, answer.fields["parameter"]) == (400, "shape")
    assert "expected [B, 4, h, w]" in answer.fields["error"]


def test_a_replica_whose_weights_cannot_be_loaded_says_why(cluster: Cluster, later: dict[str, Path]) -> None:
    assert cluster.wait_for("pickled", lambda model: model["state"] == "failed")["reason"]
    for endpoint in (f"{cluster.url}/pickled", serve.get_app_handle("pickled")):
        with RemoteVAE(endpoint) as vae, pytest.raises(ModelFailed, match="safetensors") as caught:
            vae.decode(latents(1, 4, 8, 8))
        assert caught.value.retry_after == 600


def test_a_failed_model_is_tried_again_and_recovers(cluster: Cluster, later: dict[str, Path]) -> None:
    with RemoteVAE(f"{cluster.url}/mended") as vae:
        with pytest.raises(ModelFailed):
            vae.decode(latents(1, 4, 8, 8))
        tiny_vae("sd").save_pretrained(later["mended"])
        time.sleep(0.2)
        assert vae.decode(latents(1, 4, 8, 8)).size == (64, 64)
    cluster.wait_for("mended", lambda model: model["state"] == "ready")


def test_the_fake_engine_is_chosen_by_configuration_waits_and_is_gone_within_seconds_of_its_deletion(
    cluster: Cluster, later: dict[str, Path]
) -> None:
    with RemoteVAE(f"{cluster.url}/fake") as vae:
        answer = requests.post(f"{cluster.url}/fake", params=QUERY, data=BODY)
        decode_ms = float(answer.headers["server-timing"].split("decode;dur=")[1].split(",")[0])
        assert decode_ms >= 300
        assert vae.decode(latents(1, 4, 8, 8)).size == (64, 64)
        serve.delete("fake")
        give_up = time.monotonic() + stretched(3)
        while "fake" in requests.get(f"{cluster.url}/models").text and time.monotonic() < give_up:
            time.sleep(0.1)
        with pytest.raises(UnknownModel):
            vae.describe()


@needs_node
def test_the_javascript_client_gets_what_the_python_client_gets(cluster: Cluster, tmp_path: Path) -> None:
    check_in_node(f"{cluster.url}/sd", tmp_path)
