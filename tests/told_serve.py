"""A Serve with one application, as a test tells it, and the ingress's registry that reads it; nothing of Ray runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from remote_vae.protocol.model_description import ModelDescription, State
from remote_vae.protocol.wire import PROTOCOL
from remote_vae_serve.config import IngressConfig
from remote_vae_serve.ingress import ingress, model_registry
from remote_vae_serve.ingress.model_registry import ModelRegistry

ARGUMENTS = {"protocol": PROTOCOL, "source": "stabilityai/sd-vae-ft-mse"}


class Serve:
    """A Serve with the application `sd`, and a clock, as a test tells it; it is read when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.applications: dict[str, Any] = {}
        self.says: ModelDescription | None = ModelDescription(name="sd", state="ready")
        self.asked = 0
        self.now = 1000.0
        monkeypatch.setattr(model_registry, "serve_details", lambda: {"applications": self.applications})
        monkeypatch.setattr(model_registry.ray, "cluster_resources", dict)
        monkeypatch.setattr(model_registry.ray, "available_resources", dict)
        monkeypatch.setattr(model_registry, "_transport_to", lambda name: object())
        monkeypatch.setattr(model_registry, "_ask", self._ask)
        monkeypatch.setattr(model_registry, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(ModelRegistry, "_keep_fresh", lambda registry: registry._read_once.set())
        self.registry = ModelRegistry()

    def _ask(self, name: str) -> ModelDescription | None:
        self.asked += 1
        return self.says

    def deploys(self, *replicas: str, target: int = 1, holds: tuple[int, int] = (8, 32), **user_config: Any) -> None:
        """Replicas in these states, each with so much at once, and so many that wait."""
        ongoing, queued = holds
        limits = {"max_ongoing_requests": ongoing, "max_queued_requests": queued}
        deployment = {
            "deployment_config": {"user_config": ARGUMENTS | user_config, **limits},
            "replicas": [
                {"replica_id": f"{number}", "state": state, "node_id": "here"} for number, state in enumerate(replicas)
            ],
            "target_num_replicas": target,
            "required_resources": {"CPU": 1},
        }
        self.applications["sd"] = {"status": "RUNNING", "deployments": {"VAE": deployment}}

    def refuses(self, message: str) -> None:
        """What Serve says once a builder has refused its arguments: of the deployment before it says nothing any more."""
        config = {"import_path": "remote_vae_serve.app:vae", "args": {"source": "demo", "sorce": "x"}}
        self.applications["sd"] = {
            "status": "DEPLOY_FAILED", "message": f"header\n{message}", "deployments": {}, "deployed_app_config": config,
        }  # fmt: skip

    def state(self, after_s: float = 0.0) -> State:
        self.now += after_s
        self.registry.refresh()
        return self.registry.get("sd").state


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return Serve(monkeypatch)


def placed(serve: Serve) -> None:
    """Ask the ingress for a place in the queue of `sd`."""
    with ingress_of(serve).place("sd", "somebody"):
        pass


def ingress_of(serve: Serve) -> ingress.Ingress:
    one = ingress.Ingress.__new__(ingress.Ingress)
    one._config, one._registry, one._admissions = IngressConfig(), serve.registry, {}
    return one
