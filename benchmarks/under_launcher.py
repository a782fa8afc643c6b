"""A server under the launcher, as it is shipped, with models that a measurement chooses."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from local_server import LocalServer

INGRESS = "remote-vae"


def fake_model(name: str, is_direct: bool, engine: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
    """An application with an engine that only waits.

    Args:
        is_direct: it has a path of its own; else it is behind the ingress.
        engine: settings of the fake engine.
        arguments: more of a model's.
    """
    return {
        "name": name,
        "route_prefix": f"/{name}" if is_direct else None,
        "import_path": "remote_vae_serve.app:vae",
        "args": {"source": "nowhere", "fake": dict(engine), "num_cpus": 0, **arguments},
        "deployments": [{"name": "VAE", "num_replicas": 1}],
    }


def serve(
    models: Sequence[dict[str, Any]],
    haproxy: bool,
    kept: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    sleeps: bool = False,
) -> LocalServer:
    """The shipped ingress, and these models.

    Args:
        kept: shipped models that stay.
        environment: more of it for the server.
        sleeps: the models start from no replica, so that only those that are kept are waited for.
    """

    def change(config: dict[str, Any]) -> None:
        shipped = [app for app in config["applications"] if app["name"] in (INGRESS, *kept)]
        config["applications"] = [*shipped, *models]

    command = (sys.executable, "-m", "remote_vae_serve.cli", "run", "--proxy", "haproxy" if haproxy else "python")
    names = (*kept, *(model["name"] for model in models if not sleeps))
    return LocalServer(models=names, change=change, command=command, environment=environment)


def door(is_direct: bool, haproxy: bool) -> str:
    """What a table calls the way in."""
    return f"{'direct door' if is_direct else 'ingress'}, {'HAProxy' if haproxy else 'Python proxy'}"
