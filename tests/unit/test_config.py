"""The arguments in serve_config.yaml: a wrong one is refused before a replica starts, with words that help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from remote_vae_serve.config import Arguments, FakeEngineConfig, IngressConfig, VAEConfig

SHIPPED = yaml.safe_load((Path(__file__).parents[2] / "serve_config.yaml").read_text())
BUILDERS = {"remote_vae_serve.app:vae": VAEConfig, "remote_vae_serve.app:ingress": IngressConfig}


@pytest.mark.parametrize(
    ("config", "arguments", "hint"),
    [
        (VAEConfig, {"source": "demo", "num_gpu": 1}, "'num_gpu'; did you mean 'num_gpus'"),
        (VAEConfig, {"sorce": "demo"}, "'sorce'; did you mean 'source'"),
        (VAEConfig, {"source": "demo", "data_type": "auto"}, "'data_type'; did you mean 'dtype'"),
        (VAEConfig, {"source": "demo", "fake": {"chanels": 4}}, "'chanels'; did you mean 'channels'"),
        (IngressConfig, {"deadline": 3}, "'deadline'; did you mean 'request_timeout_s'"),
        (IngressConfig, {"request_timeout": 3}, "'request_timeout'; did you mean 'request_timeout_s'"),
        (IngressConfig, {"zzz": 3}, "'zzz'; known are max_body_mib, max_bodies_mib, request_timeout_s"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(
    config: type[Arguments], arguments: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ValidationError, match=hint):
        config(**arguments)


@pytest.mark.parametrize(
    ("config", "arguments", "parameter"),
    [
        (VAEConfig, {}, "source"),
        (VAEConfig, {"source": None}, "source"),
        (VAEConfig, {"source": ["demo"]}, "source"),
        (VAEConfig, {"source": "demo", "dtype": "float8"}, "dtype"),
        (VAEConfig, {"source": "demo", "device": "tpu"}, "device"),
        (VAEConfig, {"source": "demo", "num_gpus": "two"}, "num_gpus"),
        (VAEConfig, {"source": "demo", "num_gpus": -1}, "num_gpus"),
        (VAEConfig, {"source": "demo", "num_gpus": float("nan")}, "num_gpus"),
        (VAEConfig, {"source": "demo", "num_cpus": -1}, "num_cpus"),
        (VAEConfig, {"source": "demo", "threads": 0}, "threads"),
        (VAEConfig, {"source": "demo", "threads": 1.5}, "threads"),
        (VAEConfig, {"source": "demo", "retry_s": 0}, "retry_s"),
        (VAEConfig, {"source": "demo", "fake": True}, "fake"),
        (FakeEngineConfig, {"decode_s": -1}, "decode_s"),
        (FakeEngineConfig, {"channels": 0}, "channels"),
        (IngressConfig, {"max_body_mib": 0}, "max_body_mib"),
        (IngressConfig, {"request_timeout_s": "soon"}, "request_timeout_s"),
        (IngressConfig, {"deadline_s": "soon"}, "deadline_s"),
        (IngressConfig, {"models": "demo"}, "models"),
        (IngressConfig, {"models": [1]}, "models"),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_or_size_is_refused_by_name(
    config: type[Arguments], arguments: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**arguments)
    assert {str(error["loc"][0]) for error in caught.value.errors()} == {parameter}


@pytest.mark.parametrize(("config", "rest"), [(IngressConfig, {}), (VAEConfig, {"source": "demo"})])
def test_an_argument_may_have_its_former_name(config: type[Arguments], rest: dict[str, Any]) -> None:
    for written in ({"deadline_s": 7}, {"request_timeout_s": 7}, {"deadline_s": 7, "request_timeout_s": 7.0}):
        read = config(**written, **rest)
        assert (read.request_timeout_s, read.deadline_s) == (7, 7)  # type: ignore[attr-defined]
        assert read.model_copy(update={}).model_dump()["request_timeout_s"] == 7
    with pytest.raises(ValidationError, match="request_timeout_s and its former name deadline_s differ"):
        config(deadline_s=7, request_timeout_s=8, **rest)


def test_a_hint_may_have_its_former_spelling() -> None:
    assert VAEConfig(source="demo", hints={"denormalised": True}).hints == {"denormalized": True}
    with pytest.raises(ValidationError, match="are one parameter"):
        VAEConfig(source="demo", hints={"denormalised": True, "denormalized": False})


@pytest.mark.parametrize("config", [VAEConfig(source="demo"), IngressConfig(), FakeEngineConfig()])
def test_arguments_are_frozen(config: Arguments) -> None:
    for name in type(config).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, name, getattr(config, name))


@pytest.mark.parametrize("config", [VAEConfig, IngressConfig, FakeEngineConfig])
def test_every_argument_says_what_it_is(config: type[Arguments]) -> None:
    assert all(field.description and field.description.endswith(".") for field in config.model_fields.values())


def test_the_shipped_configuration_has_no_argument_that_is_not_known() -> None:
    applications = SHIPPED["applications"]
    assert {application["import_path"] for application in applications} == set(BUILDERS)
    for application in applications:
        BUILDERS[application["import_path"]](**application.get("args", {}))


def test_the_shipped_configuration_leaves_ray_actor_options_alone() -> None:
    """There they replace the builder's own, so that a model silently loses its GPU."""
    deployments = [row for application in SHIPPED["applications"] for row in application.get("deployments", [])]
    assert deployments
    assert not [row for row in deployments if "ray_actor_options" in row]
