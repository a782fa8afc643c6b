"""The nodes in a real ComfyUI without a screen: a workflow decodes on a server of ours, and *Interrupt* ends it.

`COMFYUI` names the folder of its source, `COMFYUI_PYTHON` the Python that has what it needs, if it is another than this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from in_process import InProcess, fake_engine, pipeline_of
from limits import WAIT_S, stretched
from local_server import free_port
from remote_vae.protocol.model_description import ModelDescription
from remote_vae_serve.http.app import create_app
from served import served

COMFYUI = os.environ.get("COMFYUI", "")
ROOT = Path(__file__).parents[2]
DECODE_S = 8.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="COMFYUI names no folder with the source of ComfyUI"),
]


class Slow(InProcess):
    def describe(self, name: str) -> ModelDescription:
        return ModelDescription(
            name=name, state="ready", latent_channels=4, spatial_ratio=8, temporal_ratio=None, video=False
        )


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL; it was started beside a server whose decodes take their time."""
    base, port = tmp_path_factory.mktemp("comfyui"), free_port()
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "remote-vae").symlink_to(ROOT / "integrations" / "comfyui")
    pipeline = pipeline_of(fake_engine(decode_s=DECODE_S))
    with served(create_app(Slow(model=pipeline.answer), 1 << 24, WAIT_S)) as server:
        run = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--disable-auto-launch"]
        environment = os.environ | {"REMOTE_VAE_URL": server, "PYTHONPATH": str(ROOT / "client")}
        with subprocess.Popen(
            [*run, "--port", str(port), "--base-directory", str(base)], cwd=COMFYUI, env=environment
        ) as its:
            try:
                url = f"http://127.0.0.1:{port}"
                until(lambda: _answers(f"{url}/object_info/RemoteVAE_Load"))
                yield url
            finally:
                its.terminate()
    pipeline.close()


def _answers(url: str) -> Any:
    try:
        return requests.get(url, timeout=10).json()
    except (requests.RequestException, ValueError):
        return None


def until(condition: Callable[[], Any]) -> Any:
    give_up = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return found


def queue(url: str, seed: int) -> str:
    """A workflow that has latents decoded by the VAE of the server; its id."""
    latents = {"class_type": "EmptyLatentImage", "inputs": {"width": 64 + 8 * seed, "height": 64, "batch_size": 1}}
    vae = {"class_type": "RemoteVAE_Load", "inputs": {"url": _home(url), "model": "model"}}
    decode = {"class_type": "VAEDecode", "inputs": {"samples": ["1", 0], "vae": ["2", 0]}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "remote"}}
    graph = {"1": latents, "2": vae, "3": decode, "4": save}
    return str(requests.post(f"{url}/prompt", json={"prompt": graph}, timeout=10).json()["prompt_id"])


def _home(url: str) -> str:
    told = requests.get(f"{url}/object_info/RemoteVAE_Load", timeout=10).json()["RemoteVAE_Load"]
    return str(told["input"]["required"]["url"][1]["default"])


def ended(url: str, prompt: str) -> dict[str, Any]:
    return dict(until(lambda: requests.get(f"{url}/history/{prompt}", timeout=10).json().get(prompt)))


def test_a_workflow_decodes_on_the_server(comfyui: str) -> None:
    told = requests.get(f"{comfyui}/object_info/RemoteVAE_Load", timeout=10).json()["RemoteVAE_Load"]
    assert told["input"]["required"]["model"][0][0] == "model"
    run = ended(comfyui, queue(comfyui, 0))
    assert run["status"]["status_str"] == "success", run
    assert run["outputs"]["4"]["images"]


def test_interrupt_ends_it_within_a_second(comfyui: str) -> None:
    prompt = queue(comfyui, 1)
    until(lambda: requests.get(f"{comfyui}/queue", timeout=10).json()["queue_running"])
    time.sleep(DECODE_S / 4)
    pressed = time.monotonic()
    requests.post(f"{comfyui}/interrupt", timeout=10)
    run = ended(comfyui, prompt)
    assert time.monotonic() - pressed < stretched(1.5)
    assert "execution_interrupted" in [kind for kind, _ in run["status"]["messages"]], run
