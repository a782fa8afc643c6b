"""`serve run serve_config.yaml`, as shipped: on a machine without GPU and network, with clients that are not ours."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import simplejpeg
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode as huggingface_remote_decode
from PIL import Image

from limits import WAIT_S, stretched
from local_server import LocalServer, free_port, living
from remote_vae import remote_decode
from remote_vae_serve.engine.weights import DEMO
from samples import latents, pipeline_decode, postprocessed

LOST_GPU = {
    "name": "lost-gpu",
    "route_prefix": None,
    "import_path": "remote_vae_serve.app:vae",
    "args": {"source": "demo", "num_gpus": 1},
    "deployments": [{"name": "VAE", "ray_actor_options": {"num_cpus": 0.1}}],
}
MISSPELT = {
    "name": "misspelt",
    "route_prefix": None,
    "import_path": "remote_vae_serve.app:vae",
    "args": {"source": "demo", "sorce": "demo"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    def exact_with_two_mistakes(config: dict[str, Any]) -> None:
        (demo,) = (application for application in config["applications"] if application["name"] == "demo")
        demo["args"]["dtype"] = "float32"  # what it makes is compared with a pipeline's, to the last level
        config["applications"] += [LOST_GPU, MISSPELT]

    nobody = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}", "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    running = LocalServer(change=exact_with_two_mistakes, environment=nobody)
    with running:
        started = running.processes()
        yield running
    assert len(started) > 1
    assert not living(started)


@pytest.fixture(scope="module")
def demo_pixels() -> torch.Tensor:
    """What the demo VAE makes of `latents(1, 16, 16, 24)`, locally."""
    vae = AutoencoderKL.from_pretrained(DEMO, torch_dtype=torch.float32)
    return pipeline_decode(vae, latents(1, 16, 16, 24))


def as_jpeg(picture: Image.Image) -> Image.Image:
    """What is left of it in a JPEG of quality 90 by libjpeg-turbo, colours halved along each edge."""
    return Image.open(io.BytesIO(simplejpeg.encode_jpeg(np.asarray(picture), 90, "RGB", "420")))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_format": "png"},
        {"processor": VaeImageProcessor()},
        {"output_type": "pt", "return_type": "pt"},
        {"output_type": "pt", "processor": VaeImageProcessor()},
        {"output_type": "pt", "partial_postprocess": True},
        {"output_type": "pt", "return_type": "pt", "partial_postprocess": True},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_the_unmodified_diffusers_client_gets_what_it_asks_for(
    server: LocalServer, demo_pixels: torch.Tensor, options: dict[str, Any]
) -> None:
    config = AutoencoderKL.load_config(DEMO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers on its own do_scaling
        warnings.simplefilter("ignore", UserWarning)
        arguments: dict[str, Any] = {"endpoint": f"{server.url}/demo", "tensor": latents(1, 16, 16, 24)} | options
        own = huggingface_remote_decode(**arguments)
        given = huggingface_remote_decode(
            **arguments, scaling_factor=config["scaling_factor"], shift_factor=config["shift_factor"]
        )
    ours = remote_decode(**arguments)
    for image in (own, given, ours):
        if isinstance(image, torch.Tensor) and image.dtype == torch.float32:
            torch.testing.assert_close(image, demo_pixels, atol=2e-5, rtol=0)
            continue
        pixels = np.asarray(image[0] if isinstance(image, list) else image).astype(int).reshape(128, 192, 3)
        expected = postprocessed(demo_pixels, "pil")[0] if options else as_jpeg(postprocessed(demo_pixels, "pil")[0])
        difference = np.abs(pixels - np.asarray(expected))
        assert difference.max() <= (8 if not options else 1)  # one level before JPEG may be a few after it
        assert difference.mean() < 0.01


def test_a_replica_on_the_cpu_is_started_so_that_it_can_keep_memory(server: LocalServer) -> None:
    (replica,) = server.processes("ServeReplica:demo:VAE")
    environment = Path(f"/proc/{replica}/environ").read_bytes().split(b"\0")
    assert {b"MALLOC_ARENA_MAX=1", b"OMP_WAIT_POLICY=passive"} <= set(environment)


def test_models_that_nobody_asked_for_stay_cold_and_reading_them_wakes_none(server: LocalServer) -> None:
    for _ in range(3):
        models = {model["name"]: model for model in requests.get(f"{server.url}/models").json()["models"]}
        assert {models[name]["state"] for name in ("sd-v1", "flux")} == {"cold"}  # sd-xl is woken by another test
        assert models["sd-v1"]["source"] == "stabilityai/sd-vae-ft-mse"
        assert requests.get(f"{server.url}/flux").json()["subfolder"] == "vae"


def test_the_first_request_to_a_model_whose_hub_does_not_answer_hears_so_within_20_s(server: LocalServer) -> None:
    started = time.monotonic()
    answer = requests.post(
        f"{server.url}/sd-xl", params={"shape": [1, 4, 8, 8], "dtype": "float32"}, data=bytes(1024), timeout=WAIT_S
    )
    took = time.monotonic() - started
    assert (answer.status_code, answer.json()["code"]) == (503, "model_failed")
    assert "cannot be reached" in answer.json()["error"]
    assert int(answer.headers["retry-after"]) > 0
    assert took < stretched(20)
    give_up = time.monotonic() + WAIT_S
    while (description := requests.get(f"{server.url}/sd-xl").json())["state"] != "failed":
        assert time.monotonic() < give_up, description
        time.sleep(0.2)
    assert "cannot be reached" in description["reason"]


def test_a_gpu_lost_to_ray_actor_options_is_noticed_and_said(server: LocalServer) -> None:
    answer = requests.post(
        f"{server.url}/lost-gpu",
        params={"shape": [1, 16, 4, 4], "dtype": "float32"},
        data=bytes(1024),
        timeout=WAIT_S,
    )
    assert (answer.status_code, answer.json()["code"]) == (503, "model_failed")
    assert "ray_actor_options" in answer.json()["error"]
    assert requests.get(f"{server.url}/lost-gpu").json()["state"] == "failed"


def test_a_misspelt_argument_fails_that_application_alone_and_names_the_right_one(server: LocalServer) -> None:
    description = requests.get(f"{server.url}/misspelt").json()
    assert description["state"] == "failed"
    answer = requests.post(
        f"{server.url}/misspelt", params={"shape": [1, 16, 4, 4], "dtype": "float32"}, data=bytes(1024)
    )
    assert answer.status_code == 503
    assert "'source'" in answer.json()["error"]
