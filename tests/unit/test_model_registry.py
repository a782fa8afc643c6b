"""States of models, as the ingress reads them out of Serve's details and of what replicas say; and what it answers in each."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from remote_vae.errors import ModelFailed, ModelStarting, UnknownModel
from remote_vae.protocol.model_description import ModelDescription, State
from remote_vae.protocol.wire import PROTOCOL
from remote_vae_serve.config import IngressConfig
from remote_vae_serve.ingress import ingress, model_registry
from remote_vae_serve.ingress.model_registry import ASK_AGAIN_S, ModelRegistry

ARGUMENTS = {"protocol": PROTOCOL, "source": "stabilityai/sd-vae-ft-mse"}


class Serve:
    """A Serve with the application `sd`, and a clock, as a test tells it; it is read when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.applications: dict[str, Any] = {}
        self.says = ModelDescription(name="sd", state="ready")
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

    def _ask(self, name: str) -> ModelDescription:
        self.asked += 1
        return self.says

    def deploys(self, *replicas: str, target: int = 1, **user_config: Any) -> None:
        """Replicas in these states."""
        deployment = {
            "deployment_config": {"user_config": ARGUMENTS | user_config},
            "replicas": [
                {"replica_id": f"{number}", "state": state, "node_id": "here"} for number, state in enumerate(replicas)
            ],
            "target_num_replicas": target,
            "required_resources": {"CPU": 1},
        }
        self.applications["sd"] = {"status": "RUNNING", "deployments": {"VAE": deployment}}

    def state(self, after_s: float = 0.0) -> State:
        self.now += after_s
        self.registry.refresh()
        return self.registry.get("sd").state


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return Serve(monkeypatch)


def ingress_of(serve: Serve) -> ingress.Ingress:
    one = ingress.Ingress.__new__(ingress.Ingress)
    one._config, one._registry = IngressConfig(), serve.registry
    return one


def test_a_model_is_cold_then_starting_then_ready_and_cold_again(serve: Serve) -> None:
    serve.deploys(target=0)
    assert serve.state() == "cold"
    serve.deploys("STARTING")
    assert serve.state() == "starting"
    assert serve.asked == 0  # who is not there is not asked, or it would be woken
    serve.deploys("RUNNING")
    assert serve.state() == "ready"
    serve.deploys(target=0)
    assert serve.state() == "cold"


def test_a_replica_that_is_ready_is_asked_once_and_another_one_too(serve: Serve) -> None:
    serve.deploys("RUNNING")
    assert [serve.state(), serve.state(), serve.state(after_s=ASK_AGAIN_S)] == ["ready"] * 3
    assert serve.asked == 1
    serve.deploys("RUNNING", "RUNNING")
    serve.state()
    assert serve.asked == 2


def test_a_failed_one_says_why_and_is_asked_again_now_and_then(serve: Serve) -> None:
    serve.says = ModelDescription(name="sd", state="failed", reason="no weights")
    serve.deploys("RUNNING")
    assert serve.state() == "failed"
    assert serve.registry.get("sd").describe().reason == "no weights"
    assert (serve.state(after_s=ASK_AGAIN_S - 1), serve.asked) == ("failed", 1)
    serve.says = ModelDescription(name="sd", state="ready")
    assert (serve.state(after_s=1), serve.asked) == ("ready", 2)


def test_a_failed_one_that_answers_is_asked_at_the_next_refresh(serve: Serve) -> None:
    serve.says = ModelDescription(name="sd", state="failed", reason="no weights")
    serve.deploys("RUNNING")
    serve.state()
    serve.says = ModelDescription(name="sd", state="ready")
    serve.registry.mended("sd")
    assert serve.state() == "ready"


def test_what_a_failed_one_said_stands_while_it_has_no_replica(serve: Serve) -> None:
    serve.says = ModelDescription(name="sd", state="failed", reason="no weights")
    serve.deploys("RUNNING")
    serve.state()
    serve.deploys(target=0)
    assert serve.state() == "failed"
    assert serve.registry.get("sd").describe().reason == "no weights"


@pytest.mark.parametrize("name", ["models", "health", "Sd", "-sd", "a/b"])
def test_an_application_that_could_not_be_routed_is_not_served(serve: Serve, name: str) -> None:
    serve.deploys("RUNNING")
    serve.applications[name] = serve.applications["sd"]
    assert serve.state() == "ready"
    with pytest.raises(UnknownModel, match="served: sd"):
        serve.registry.get(name)


@pytest.mark.parametrize("user_config", [{"protocol": PROTOCOL + 1}, {"protocol": None}, {"class": 3}])
def test_a_deployment_of_somebody_else_is_not_served(serve: Serve, user_config: dict[str, Any]) -> None:
    serve.deploys("RUNNING", **user_config)
    with pytest.raises(UnknownModel, match="none yet"):
        serve.state()


def test_a_field_that_a_newer_server_has_is_no_reason_not_to_be_served(serve: Serve) -> None:
    serve.deploys("RUNNING", colour="blue")
    assert serve.state() == "ready"


def test_an_application_that_is_being_built_or_was_refused_is_told_by_its_config(serve: Serve) -> None:
    config = {"import_path": "remote_vae_serve.app:vae", "args": {"source": "somewhere"}}
    serve.applications["sd"] = {"status": "DEPLOYING", "deployments": {}, "deployed_app_config": config, "message": ""}
    assert serve.state() == "starting"
    with pytest.raises(ModelStarting) as starting:
        ingress_of(serve).find("sd")
    assert starting.value.retry_after == 2
    serve.applications["sd"] |= {"status": "DEPLOY_FAILED", "message": "Traceback\nValueError: sorce is unknown"}
    assert serve.state() == "failed"
    with pytest.raises(ModelFailed, match=r"sd could not be deployed: .*sorce is unknown") as failed:
        ingress_of(serve).find("sd")
    assert failed.value.retry_after == 30
    serve.applications["sd"]["deployed_app_config"] = {"import_path": "somebody.else:app"}
    with pytest.raises(UnknownModel):
        serve.state()


class Answering:
    """The way to a model whose replica answers at once."""

    async def try_one_async(self, request: object) -> object:
        return request


def test_an_answer_of_a_failed_model_has_its_replica_asked_anew(serve: Serve) -> None:
    serve.says = ModelDescription(name="sd", state="failed", reason="no weights")
    serve.deploys("RUNNING")
    serve.state()
    answered = asyncio.run(ingress_of(serve)._answer(Answering(), "sd", "anything"))  # type: ignore[arg-type]
    assert answered == "anything"
    serve.says = ModelDescription(name="sd", state="ready")
    assert serve.state() == "ready"
