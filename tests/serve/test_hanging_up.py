"""On real Serve, a client that leaves: heard through proxy, ingress and handle at the frame that is being decoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from ray import serve

from families.video import CASES
from house import hang_up, post
from limits import WAIT_S, stretched
from raw_http import connect
from remote_vae import RemoteVAE, Waiting
from remote_vae.errors import Cancelled, TimedOut
from remote_vae.protocol.output import Output
from running_cluster import Cluster
from samples import latents

FRAMES = 161
LONG, SHORT = latents(1, 16, FRAMES, 12, 12), latents(1, 16, 1, 2, 2)
FRAMES_MEANWHILE = 20
"""That may be decoded between a client's going and the device's hearing of it, on a machine that has much else to do."""


@pytest.fixture(scope="module")
def wan(bare_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model that decodes a video frame by frame; its endpoint."""
    folder = tmp_path_factory.mktemp("wan") / "weights"
    next(case for case in CASES if case.class_name == "AutoencoderKLWan").build().save_pretrained(folder)
    bare_cluster.deploy("wan", source=str(folder), device="cpu", threads=1)
    yield f"{bare_cluster.url}/wan"
    serve.delete("wan", _blocking=False)


def over_http(url: str) -> None:
    connection = connect(url)
    connection.sendall(post(LONG, Output.PT, "/wan"))
    time.sleep(3)
    hang_up(connection)


def through_a_handle(url: str) -> None:
    with RemoteVAE.from_app("wan", timeout=3, retries=0) as vae, pytest.raises(TimedOut):
        vae.decode(LONG, output_type="pt")


def interrupted(vae: RemoteVAE, told: list[str]) -> None:
    began = time.monotonic()
    with vae, pytest.raises(Cancelled):
        vae.decode(LONG, output_type="pt")
    assert time.monotonic() - began < 3 + stretched(1)
    assert told[-1] == ("decoding" if vae._transport.peek else "waiting")


def over_http_by_on_wait(url: str) -> None:
    told: list[str] = []
    interrupted(RemoteVAE(url, on_wait=partial(_for_three_seconds, told)), told)


def through_a_handle_by_on_wait(url: str) -> None:
    told: list[str] = []
    interrupted(RemoteVAE.from_app("wan", on_wait=partial(_for_three_seconds, told)), told)


def _for_three_seconds(told: list[str], waiting: Waiting) -> None:
    told.append(waiting.state)
    if waiting.seconds > 3:
        raise Cancelled("by its user")


@pytest.mark.parametrize("leave", [over_http, through_a_handle, over_http_by_on_wait, through_a_handle_by_on_wait])
def test_the_device_is_free_at_the_next_frame(wan: str, leave: Callable[[str], None]) -> None:
    with RemoteVAE(wan, timeout=WAIT_S) as vae:
        before = vae.decode(SHORT, output_type="pt")
        began = time.monotonic()
        vae.decode(LONG[:, :, :FRAMES_MEANWHILE], output_type="pt")
        some_frames_s = time.monotonic() - began
        leave(wan)
        began = time.monotonic()
        after = vae.decode(SHORT, output_type="pt")
        assert time.monotonic() - began < some_frames_s
        assert torch.equal(before, after)
