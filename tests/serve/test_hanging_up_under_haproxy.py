"""A client that leaves, under HAProxy: the model's own replica answers there, and hears of it all the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from families.video import CASES
from haproxy_binary import why_no_haproxy
from limits import WAIT_S, stretched
from local_server import LocalServer
from remote_vae import RemoteVAE, Waiting
from remote_vae.errors import Cancelled
from samples import latents

pytestmark = pytest.mark.slow
TOKEN = "a-token-of-the-tests"
FRAMES, FRAMES_MEANWHILE = 161, 20
LONG, SHORT = latents(1, 16, FRAMES, 12, 12), latents(1, 16, 1, 2, 2)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model that decodes a video frame by frame; its endpoint."""
    if (reason := why_no_haproxy()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("wan") / "weights"
    next(case for case in CASES if case.class_name == "AutoencoderKLWan").build().save_pretrained(folder)
    model = {
        "name": "wan", "route_prefix": None, "import_path": "remote_vae_serve.app:vae",
        "args": {"source": str(folder), "device": "cpu", "threads": 1, "num_cpus": 0},
        "deployments": [{"name": "VAE", "num_replicas": 1}],
    }  # fmt: skip

    def change(config: dict[str, Any]) -> None:
        ingress = next(app for app in config["applications"] if app["name"] == "remote-vae")
        config["applications"] = [ingress, model]

    command = (sys.executable, "-m", "remote_vae_serve.cli", "run", "--token", TOKEN)
    with LocalServer(models=("wan",), change=change, command=command, token=TOKEN) as server:
        yield f"{server.url}/wan"


def test_the_device_is_free_at_the_next_frame_and_the_position_is_told(wan: str) -> None:
    told: list[Waiting] = []

    def for_three_seconds(waiting: Waiting) -> None:
        told.append(waiting)
        if waiting.seconds > 3:
            raise Cancelled("by its user")

    with RemoteVAE(wan, timeout=WAIT_S, token=TOKEN) as vae:
        before = vae.decode(SHORT, output_type="pt")
        began = time.monotonic()
        vae.decode(LONG[:, :, :FRAMES_MEANWHILE], output_type="pt")
        some_frames_s = time.monotonic() - began
        first = vae.submit(LONG, output_type="pt")
        time.sleep(0.5)
        began = time.monotonic()
        with RemoteVAE(wan, token=TOKEN, on_wait=for_three_seconds) as behind, pytest.raises(Cancelled):
            behind.decode(LONG, output_type="pt")
        assert time.monotonic() - began < 3 + stretched(1)
        assert (told[-1].state, told[-1].ahead) == ("queued", 1)
        assert not first.done()
        assert first.result(WAIT_S) is not None

        told.clear()
        with RemoteVAE(wan, token=TOKEN, on_wait=for_three_seconds) as alone, pytest.raises(Cancelled):
            alone.decode(LONG, output_type="pt")
        assert told[-1].state == "decoding"
        began = time.monotonic()
        after = vae.decode(SHORT, output_type="pt")
        assert time.monotonic() - began < some_frames_s
        assert torch.equal(before, after)
