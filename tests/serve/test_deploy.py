"""`serve deploy` of a configuration with one model more, or one less, leaves the other models' processes alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import requests

from limits import WAIT_S
from local_server import LocalServer


def fake(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": None,
        "import_path": "remote_vae_serve.app:vae",
        "args": {"source": "x", "device": "cpu", "num_gpus": 0, "fake": {}},
    }


@pytest.mark.slow
def test_a_model_comes_and_goes_without_touching_the_others() -> None:
    def two_models(config: dict[str, Any]) -> None:
        config["applications"] = [config["applications"][0], fake("first"), fake("second")]

    with LocalServer(models=("first", "second"), change=two_models) as server:
        token = {"Authorization": f"Bearer {server.ray_environment['RAY_AUTH_TOKEN']}"}

        def pids() -> dict[str, list[int]]:
            details = requests.get(f"{server.dashboard}/api/serve/applications/", headers=token, timeout=WAIT_S).json()
            return {
                name: sorted(
                    replica["pid"]
                    for deployment in application["deployments"].values()
                    for replica in deployment["replicas"]
                )
                for name, application in details["applications"].items()
            }

        def deploy(*names: str) -> None:
            def with_names(config: dict[str, Any]) -> None:
                config["applications"] = [config["applications"][0], *map(fake, names)]

            server.deploy(with_names)

        def until(condition: Callable[[], bool]) -> None:
            give_up = time.monotonic() + WAIT_S
            while not condition():
                assert time.monotonic() < give_up
                time.sleep(0.3)

        def listed() -> list[str]:
            models = requests.get(f"{server.url}/models", timeout=WAIT_S).json()["models"]
            return [model["name"] for model in models if model["state"] == "ready"]

        before = pids()
        deploy("first", "second", "third")
        until(lambda: listed() == ["first", "second", "third"])
        more = pids()
        assert {name: more[name] for name in before} == before
        deploy("second", "third")
        until(lambda: listed() == ["second", "third"])
        less = pids()
        assert {name: less[name] for name in ("remote-vae", "second")} == {
            name: before[name] for name in ("remote-vae", "second")
        }
        assert less["third"] == more["third"]
