"""States of models, as the ingress reads them out of Serve's details and of what replicas say; and what it answers in each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from remote_vae.errors import ModelFailed, ModelStarting, UnknownModel
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.wire import PROTOCOL
from remote_vae_serve.admission import Admission
from remote_vae_serve.ingress import model_registry
from remote_vae_serve.ingress.model_registry import ASK_AGAIN_S
from told_serve import Serve, ingress_of, placed, serve

__all__ = ["serve"]  # a fixture


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


def test_a_mistake_in_a_deploy_leaves_the_model_that_runs_as_it_is(serve: Serve) -> None:
    serve.deploys("RUNNING")
    serve.state()
    serve.refuses("unknown argument 'sorce'")
    assert serve.state() == "ready"
    assert serve.asked == 2  # its replicas, whether they are still there
    assert "unknown argument 'sorce'" in str(serve.registry.get("sd").describe().reason)
    assert serve.registry.get("sd").transport is not None
    assert (serve.state(after_s=ASK_AGAIN_S - 1), serve.asked) == ("ready", 2)
    assert (serve.state(after_s=1), serve.asked) == ("ready", 3)
    serve.deploys("RUNNING")  # the mistake is mended, and nothing else was to change: the replicas are the same
    assert serve.state() == "ready"
    assert not serve.registry.get("sd").describe().reason


def test_a_new_ingress_learns_by_an_answer_that_replicas_of_before_are_there(serve: Serve) -> None:
    """Serve says nothing of them once a deploy has failed, and to ask would start one."""
    serve.refuses("unknown argument 'sorce'")
    assert (serve.state(), serve.asked) == ("failed", 0)
    serve.registry.mended("sd")
    assert (serve.state(), serve.asked) == ("ready", 1)
    assert "the one before goes on: unknown argument 'sorce'" in str(serve.registry.get("sd").describe().reason)
    serve.says = None
    assert (serve.state(after_s=ASK_AGAIN_S), serve.asked) == ("failed", 2)
    assert (serve.state(after_s=ASK_AGAIN_S), serve.asked) == ("failed", 2)


def test_when_its_replicas_do_not_answer_any_more_the_mistake_is_what_is_wrong(serve: Serve) -> None:
    serve.deploys("RUNNING")
    serve.state()
    serve.refuses("unknown argument 'sorce'")
    serve.says = None
    assert serve.state() == "failed"
    assert "unknown argument 'sorce'" in str(serve.registry.get("sd").describe().reason)
    assert serve.registry.get("sd").transport is not None  # Serve may start them again, and they would answer


def test_a_model_that_never_ran_fails_by_its_mistake_and_is_not_asked(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_registry, "_transport_to", lambda name: None)
    serve.refuses("unknown argument 'sorce'")
    assert (serve.state(), serve.asked) == ("failed", 0)
    with pytest.raises(ModelFailed, match="sorce"):
        placed(serve)


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
        placed(serve)
    assert starting.value.retry_after == 2
    serve.applications["sd"] |= {"status": "DEPLOY_FAILED", "message": "Traceback\nValueError: sorce is unknown"}
    assert serve.state() == "failed"
    with pytest.raises(ModelFailed, match=r"sd could not be deployed: .*sorce is unknown") as failed:
        placed(serve)
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
    answered = asyncio.run(ingress_of(serve)._answer(Answering(), "sd", Admission("sd"), "anything"))  # type: ignore[arg-type]
    assert answered == "anything"
    serve.says = ModelDescription(name="sd", state="ready")
    assert serve.state() == "ready"


def test_what_a_start_took_is_remembered_when_the_replica_has_gone(serve: Serve) -> None:
    serve.says = ModelDescription(name="sd", state="ready", startup={"imports_s": 2.0, "weights_s": 4.0, "began": 1e9})
    serve.deploys("RUNNING")
    serve.state()
    serve.deploys(target=0)
    assert serve.state() == "cold"
    assert 6 < serve.registry.get("sd").start_s < 12
