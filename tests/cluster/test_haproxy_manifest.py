"""The shipped manifest: HAProxy in a cluster as the launcher has it on one machine, and a path of its own for each model."""

from __future__ import annotations

import ast
import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema
from test_manifests import MANIFEST, SOURCE, by_name, crd, generate

from remote_vae import ray_internals
from remote_vae_serve import model_paths, proxy
from remote_vae_serve.app import vae
from remote_vae_serve.config import IngressConfig, VAEConfig
from remote_vae_serve.haproxy import command
from remote_vae_serve.middleware import settings

__all__ = ["crd"]  # a fixture

TEXTS = (generate.SOURCE.read_text(), generate.TEMPLATE.read_text(), generate.HAPROXY.read_text())
BARE: dict[str, Any] = yaml.safe_load(generate.generate(*TEXTS[:2]))
"""For Serve's own proxy."""
SCALED: dict[str, dict[str, Any]] = {
    "one for good": {"num_replicas": 1},
    "a number that Serve chooses": {"num_replicas": "auto"},
    "one at least": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}},
    "from none": {"autoscaling_config": {"min_replicas": 0, "max_replicas": 4}},
}


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def flux(**deployment: Any) -> str:
    """The shipped configuration with `flux` deployed in that way."""
    config = copy.deepcopy(SOURCE)
    by_name(config)["flux"]["deployments"] = [{"name": "VAE"} | deployment]
    return str(yaml.safe_dump(config))


def made_of(source: str) -> dict[str, Any]:
    """What Serve is told, checked by its schema."""
    manifest = yaml.safe_load(generate.generate(source, *TEXTS[1:]))
    config: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    ServeDeploySchema(**config)
    return config


def test_every_ray_container_has_what_the_launcher_sets() -> None:
    launcher = (
        ray_internals.FAST_VARIABLES
        | {ray_internals.MIDDLEWARE_VARIABLE: proxy.IMPORT_PATH}
        | {ray_internals.HAPROXY_BINARY_VARIABLE: f"/home/ray/{command.NAME}", command.METRICS_HOST: "0.0.0.0"}
    )
    limit = {settings.MAX_BODY_MIB: str(by_name(SOURCE)["remote-vae"]["args"]["max_body_mib"])}
    for container, before in zip(containers(MANIFEST), containers(BARE), strict=True):
        added = container["env"][len(before.get("env", [])) :]
        assert container | {"env": added} == before | {"env": added}
        assert container["env"] == [*before.get("env", []), *added]
        assert {one["name"]: one["value"] for one in added if "value" in one} == launcher | limit
        names = [variable["name"] for variable in container["env"]]
        assert len(names) == len(set(names))
    assert generate.MAX_BODY_MIB == settings.MAX_BODY_MIB


def test_the_image_has_our_haproxy_where_serve_looks_for_it() -> None:
    (links,) = re.findall(r"^RUN ln -s .*$", (generate.HERE / "Dockerfile").read_text(), re.MULTILINE)
    assert links == f'RUN ln -s "$(command -v {command.NAME})" /home/ray/{command.NAME}'


def test_every_ray_container_recovers_and_spills_as_under_the_launcher() -> None:
    for container in (*containers(MANIFEST), *containers(BARE)):
        set_there = {one["name"]: one.get("value") for one in container["env"]}
        assert (
            set_there.items()
            >= (
                ray_internals.RECOVERY_VARIABLES | ray_internals.DEATH_VARIABLES | ray_internals.UNFUSED_VARIABLES
            ).items()
        )
        folder = Path(set_there[ray_internals.SPILL_VARIABLE])
        assert str(folder.parent) in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_head_gives_up_a_silent_node_sooner_than_rays_default() -> None:
    (head,) = (one for one in containers(MANIFEST) if one["name"] == "ray-head")
    assert {one["name"]: one.get("value") for one in head["env"]}.items() >= ray_internals.SILENCE_VARIABLES.items()


def test_tokens_come_from_an_optional_secret_and_stand_nowhere_in_the_manifest() -> None:
    for container in containers(MANIFEST):
        (tokens,) = [variable for variable in container["env"] if variable["name"] == settings.TOKENS]
        secret = {"name": "remote-vae-tokens", "key": "tokens", "optional": True}
        assert tokens == {"name": settings.TOKENS, "valueFrom": {"secretKeyRef": secret}}


def test_the_proxy_starts_with_these_variables() -> None:
    environment = {variable["name"]: variable.get("value", "one,two") for variable in containers(MANIFEST)[0]["env"]}
    assert settings.Settings.of(environment) == settings.Settings(256 * 2**20, ("one", "two"))


def test_a_limit_that_is_not_stated_is_left_to_the_default_of_the_ingress() -> None:
    config = copy.deepcopy(SOURCE)
    del by_name(config)["remote-vae"]["args"]["max_body_mib"]
    manifest = yaml.safe_load(generate.generate(yaml.safe_dump(config), *TEXTS[1:]))
    assert settings.MAX_BODY_MIB not in [variable["name"] for one in containers(manifest) for variable in one["env"]]
    assert settings.Settings.of({}).max_body == IngressConfig().max_body


def test_the_pages_that_the_ingress_allows_are_known_in_every_ray_container() -> None:
    config = copy.deepcopy(SOURCE)
    for written, told in ((["https://a", "http://b:3000"], "https://a,http://b:3000"), ("*", "*")):
        by_name(config)["remote-vae"]["args"]["allow_origins"] = written
        manifest = yaml.safe_load(generate.generate(yaml.safe_dump(config), *TEXTS[1:]))
        for container in containers(manifest):
            assert {"name": settings.ALLOW_ORIGINS, "value": told} in container["env"]
        models = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
        assert all(app["args"]["allow_origins"] == written for app in models)
    assert generate.ALLOW_ORIGINS == settings.ALLOW_ORIGINS


def test_nothing_else_changes_and_the_crd_knows_every_field(crd: Any) -> None:
    assert [error.message for error in crd.iter_errors(MANIFEST)] == []
    bare = copy.deepcopy(MANIFEST)
    for container, before in zip(containers(bare), containers(BARE), strict=True):
        container.pop("env")
        container.update({"env": before["env"]} if "env" in before else {})
    assert bare["spec"].pop("serveConfigV2") == generate.dump(
        model_paths.with_model_paths(yaml.safe_load(BARE["spec"]["serveConfigV2"]))
    )
    assert bare == BARE | {"spec": {key: value for key, value in BARE["spec"].items() if key != "serveConfigV2"}}


@pytest.mark.parametrize("deployment", SCALED.values(), ids=SCALED)
def test_every_model_gets_a_path_of_its_own_kept_warm_or_not(deployment: dict[str, Any]) -> None:
    paths = {name: application["route_prefix"] for name, application in by_name(made_of(flux(**deployment))).items()}
    assert paths == {name: "/" if name == "remote-vae" else f"/{name}" for name in paths}
    assert {"flux", "sd-v1"} <= paths.keys()


def test_an_entry_without_deployments_gets_one_too_and_a_path_that_was_chosen_stays() -> None:
    for chosen, path in ((None, "/flux"), ("/mine", "/mine")):
        config = copy.deepcopy(SOURCE)
        application = by_name(config)["flux"]
        del application["deployments"]
        application["route_prefix"] = chosen
        assert by_name(made_of(yaml.safe_dump(config)))["flux"]["route_prefix"] == path


def scaled(target: float | None = None, most: int | None = None) -> str:
    scaling = {"min_replicas": 1, "max_replicas": 4} | ({} if target is None else {"target_ongoing_requests": target})
    return flux(autoscaling_config=scaling, **({} if most is None else {"max_ongoing_requests": most}))


@pytest.mark.parametrize(("target", "most"), [(1, 1), (2, 2), (2, 3), (None, 3), (80, None)])
def test_a_limit_that_hides_the_load_from_the_autoscaling_is_refused(target: float | None, most: int | None) -> None:
    generate.generate(scaled(target, most), TEXTS[1])  # a handle counts what waits as well
    with pytest.raises(generate.Unfit, match="application 'flux': max_ongoing_requests is"):
        generate.generate(scaled(target, most), *TEXTS[1:])


@pytest.mark.parametrize(("target", "most"), [(None, None), (2, 4), (4, None), (0.5, 1)])
def test_a_limit_well_above_the_target_is_taken(target: float | None, most: int | None) -> None:
    made_of(scaled(target, most))


def test_what_is_not_stated_is_what_our_builder_and_serve_say() -> None:
    assert AutoscalingConfig().target_ongoing_requests == generate.TARGET_ONGOING
    deployment = vae(VAEConfig(source="demo", num_gpus=0))._bound_deployment
    assert deployment.max_ongoing_requests == generate.MAX_ONGOING


def test_each_proxy_has_its_manifest_written_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "MANIFEST", tmp_path / "rayservice.yaml")
    for flags in ([], ["--proxy", "haproxy"], ["--haproxy"], ["--fast"]):
        assert generate.main(flags) == generate.main(["--check"]) == 0
        assert (tmp_path / "rayservice.yaml").read_text() == generate.generate(*TEXTS)
    assert generate.main(["--proxy", "python", "--check"]) == 1
    assert "stale: run `python cluster/generate.py --proxy python`" in capsys.readouterr().err
    assert generate.main(["--proxy", "python"]) == generate.main(["--proxy", "python", "--check"]) == 0
    assert (tmp_path / "rayservice.yaml").read_text() == generate.generate(*TEXTS[:2])


@pytest.mark.parametrize("path", [generate.__file__, model_paths.__file__], ids=lambda path: Path(path).name)
def test_the_generator_and_what_it_loads_of_the_server_import_nothing_but_python_and_yaml(path: str) -> None:
    tree = ast.parse(Path(path).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names | {"yaml"}
