"""The autoscaling policy: a mistake in its arguments must not stop Serve's controller."""

from __future__ import annotations

import subprocess
import sys

import pytest

from remote_vae_serve.scaling import IDLE_S, YieldWhenIdle


@pytest.mark.parametrize("arguments", [{"idle_sec": 3}, {"idle_s": "abc"}, {"idle_s": None}])
def test_a_mistake_is_logged_and_the_default_stands(
    arguments: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    policy = YieldWhenIdle(**arguments)  # type: ignore[arg-type]
    assert policy._idle_s == IDLE_S
    assert next(iter(arguments)) in caplog.text


OUTSIDE = """
from remote_vae import RemoteVAE
from remote_vae.errors import UnknownModel
try:
    RemoteVAE.from_app("demo")
except UnknownModel as error:
    print(error)
"""


def test_a_process_outside_any_cluster_is_told_to_join_one() -> None:
    run = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True, check=True)
    assert "ray.init" in run.stdout
