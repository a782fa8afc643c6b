"""The manifests under cluster/, read by what will read them: Serve's schema, our builders, Ray's autoscaler, KubeRay's CRD.

No cluster is started. What cannot be checked without one stands in cluster/README.md.
"""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.serve.schema import ServeDeploySchema

from remote_vae_serve.config import IngressConfig, VAEConfig

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
# The openAPIV3Schema of version v1 in KubeRay's CRD (Apache License 2.0), without the rest of that file.
CRD = Path(__file__).parent / "rayservice-v1.kuberay-1.7.0.schema.json.gz"
INGRESS, VAE = "remote_vae_serve.app:ingress", "remote_vae_serve.app:vae"

_spec = importlib.util.spec_from_file_location("cluster_generate", CLUSTER / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = generate
_spec.loader.exec_module(generate)

SOURCE: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
TEXT = (CLUSTER / "rayservice.yaml").read_text()
MANIFEST: dict[str, Any] = yaml.safe_load(TEXT)
SERVE: dict[str, Any] = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])
RAY: dict[str, Any] = MANIFEST["spec"]["rayClusterConfig"]
GROUPS = {"head": RAY["headGroupSpec"]} | {group["groupName"]: group for group in RAY["workerGroupSpecs"]}


def by_name(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {application["name"]: application for application in config["applications"]}


def pod(group: str) -> dict[str, Any]:
    spec: dict[str, Any] = GROUPS[group]["template"]["spec"]
    return spec


def ray_version(text: str, pattern: str) -> str:
    (version,) = re.findall(pattern, text, re.MULTILINE)
    return str(version)


def test_rayservice_yaml_is_fresh_and_the_generator_deterministic() -> None:
    assert generate.main(["--check"]) == 0
    inputs = (generate.SOURCE.read_text(), generate.TEMPLATE.read_text(), generate.HAPROXY.read_text())
    assert generate.generate(*inputs) == generate.generate(*inputs) == TEXT


@pytest.mark.parametrize("before", [TEXT + "# edited\n", None], ids=["edited", "absent"])
def test_a_stale_manifest_is_said_in_a_sentence_and_not_touched(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "rayservice.yaml"
    monkeypatch.setattr(generate, "MANIFEST", manifest)
    if before is not None:
        manifest.write_text(before)
    assert generate.main(["--check"]) == 1
    assert "stale: run `python cluster/generate.py`" in capsys.readouterr().err
    assert (manifest.read_text() if manifest.exists() else None) == before
    assert generate.main([]) == 0
    assert manifest.read_text() == TEXT


def test_anchors_are_written_out() -> None:
    for text in (TEXT, MANIFEST["spec"]["serveConfigV2"]):
        assert not [event for event in yaml.parse(text) if getattr(event, "anchor", None)]


def test_serve_takes_the_configuration_and_the_builders_take_the_arguments() -> None:
    ServeDeploySchema(**SERVE)
    for application in SERVE["applications"]:
        model = {INGRESS: IngressConfig, VAE: VAEConfig}[application["import_path"]]
        model(**application.get("args", {}))


def test_nothing_but_what_the_generator_states_differs_from_serve_config() -> None:
    assert {key for key in SERVE.keys() | SOURCE.keys() if SERVE.get(key) != SOURCE.get(key)} == {
        "http_options",
        "applications",
    }
    assert SERVE["http_options"] == SOURCE["http_options"] | {"host": "0.0.0.0", "port": 8000}
    here, there = by_name(SOURCE), by_name(SERVE)
    ingress = here["remote-vae"]["args"]
    limits = {name: value for name, value in ingress.items() if name in generate.model_paths.LIMITS}
    assert limits
    assert [name for name in here if name != "demo"] == list(there)
    for name, application in there.items():
        given = here[name]["args"]
        gpus = given.get("num_gpus", "auto")
        stated: dict[str, Any] = {}
        if application["import_path"] == VAE and (given.get("device") == "cpu" or gpus == 0):
            stated = {"device": "cpu", "num_gpus": 0}
        elif application["import_path"] == VAE:
            stated = {"device": "cuda", "num_gpus": 1 if gpus == "auto" else gpus, "num_cpus": 0}
        path = here[name]["route_prefix"] or f"/{name}"
        assert application == here[name] | {"args": limits | given | stated, "route_prefix": path}


@pytest.mark.parametrize(
    ("given", "stated"),
    [
        ({}, {"device": "cuda", "num_gpus": 1, "num_cpus": 0}),
        ({"device": "auto", "num_gpus": "auto"}, {"device": "cuda", "num_gpus": 1, "num_cpus": 0}),
        ({"num_gpus": 0.5, "num_cpus": 2}, {"device": "cuda", "num_gpus": 0.5, "num_cpus": 0}),
        ({"device": "cpu"}, {"device": "cpu", "num_gpus": 0}),
        ({"num_gpus": 0, "num_cpus": 2}, {"device": "cpu", "num_gpus": 0, "num_cpus": 2}),
    ],
)
def test_auto_becomes_a_gpu_and_a_choice_that_was_made_stands(given: dict[str, Any], stated: dict[str, Any]) -> None:
    assert generate.on_a_gpu({"source": "x"} | given) == {"source": "x"} | stated


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_gpus": "auto"}, "application 'flux': num_gpus is auto"),
        ({"device": "auto"}, "application 'flux': device is auto"),
        ({"num_gpus": None}, "application 'flux': num_gpus is auto"),
        ({"device": None}, "application 'flux': device is auto"),
    ],
)
def test_auto_is_refused_where_gpu_nodes_start_from_zero(change: dict[str, Any], complaint: str) -> None:
    generate.check(MANIFEST)
    config = copy.deepcopy(SERVE)
    args = by_name(config)["flux"]["args"]
    args.update(change)
    for key in [key for key, value in args.items() if value is None]:
        del args[key]  # absent means auto
    manifest = copy.deepcopy(MANIFEST)
    manifest["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    with pytest.raises(generate.Unfit, match=complaint):
        generate.check(manifest)


def test_ray_actor_options_that_would_drop_the_gpu_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy.deepcopy(SOURCE)
    by_name(config)["flux"]["deployments"] = [{"name": "VAE", "ray_actor_options": {"num_cpus": 1}}]
    source = tmp_path / "serve_config.yaml"
    source.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(generate, "SOURCE", source)
    assert generate.main([]) == 1
    assert "application 'flux': ray_actor_options" in capsys.readouterr().err
    assert (CLUSTER / "rayservice.yaml").read_text() == TEXT


def launches(models: list[str]) -> dict[str, int]:
    """The nodes Ray's autoscaler adds to a head for the ingress and one replica of each of these models."""
    config = AutoscalingConfig(
        _derive_autoscaling_config_from_ray_cr(
            {"metadata": {"name": "remote-vae", "namespace": "default"}, "spec": RAY}
        ),
        skip_content_hash=True,
    )
    applications = by_name(SERVE)
    args = [VAEConfig(**applications[name]["args"]) for name in models]
    demands: list[dict[str, float]] = [{"CPU": IngressConfig(**applications["remote-vae"]["args"]).num_cpus}]
    for model in args:
        assert model.num_gpus != "auto"
        demands.append({"GPU": model.num_gpus} | ({"CPU": model.num_cpus} if model.num_cpus else {}))
    reply = ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(d, []) for d in demands]),
        )
    )
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_the_autoscaler_places_the_ingress_without_a_gpu_node_and_adds_one_for_each_model_that_is_asked_for() -> None:
    models = [name for name, application in by_name(SERVE).items() if application["import_path"] == VAE]
    assert launches([]) == {"front": 1}
    assert launches(models[:1]) == {"front": 1, "gpu": 1}
    assert launches(models[:3]) == {"front": 1, "gpu": 3}


def test_gpu_nodes_start_from_none_and_offer_no_cpus() -> None:
    gpu = GROUPS["gpu"]
    assert gpu["replicas"] == gpu["minReplicas"] == 0
    assert gpu["maxReplicas"] >= 1
    assert RAY["enableInTreeAutoscaling"] is True
    assert GROUPS["head"]["rayStartParams"]["num-cpus"] == gpu["rayStartParams"]["num-cpus"] == "0"
    assert pod("gpu")["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert [toleration["key"] for toleration in pod("gpu")["tolerations"]] == ["nvidia.com/gpu"]


def test_the_control_plane_asks_for_a_token_and_the_head_gets_no_requests() -> None:
    assert RAY["authOptions"]["mode"] == "token"
    assert MANIFEST["spec"]["excludeHeadPodFromServeSvc"] is True


@pytest.mark.parametrize("group", GROUPS)
def test_every_pod_is_unprivileged_and_has_room_for_the_object_store(group: str) -> None:
    spec = pod(group)
    assert spec["securityContext"]["runAsNonRoot"] is True
    (container,) = spec["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    (shared,) = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shared-memory"]
    assert shared["medium"] == "Memory"
    assert 0.3 * memory <= int(shared["sizeLimit"].removesuffix("Gi")) < memory
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    if group != "head":
        assert spec["restartPolicy"] == "Never"


def test_the_hub_token_comes_from_an_optional_secret_and_weights_go_to_a_volume() -> None:
    (container,) = pod("gpu")["containers"]
    environment = {variable["name"]: variable for variable in container["env"]}
    assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
    assert "value" not in environment["HF_TOKEN"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert environment["HF_HOME"]["value"] == mounts["weights"]
    for group in ("head", "front"):
        (container,) = pod(group)["containers"]
        assert "HF_TOKEN" not in {variable["name"] for variable in container["env"]}


def strict(schema: Any) -> Any:
    """A CRD's schema for jsonschema: an unknown field is an error, as it is for `kubectl apply`, and Kubernetes' words kept."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    # Under `properties` stand names of fields, which may well be called `properties` or `type`.
    made = {
        key: {name: strict(field) for name, field in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
    }
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def crd() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(strict(json.loads(gzip.decompress(CRD.read_bytes()))))


def test_kuberays_crd_knows_every_field(crd: jsonschema.Draft7Validator) -> None:
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("ray.io/v1", "RayService")
    assert [f"{error.json_path}: {error.message}" for error in crd.iter_errors(MANIFEST)] == []


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (["rayClusterConfig", "workerGroupSpecs", 1], "maxReplica", 4),
        ([], "serveConfigV3", ""),
        (["rayClusterConfig", "authOptions"], "mode", "tokens"),
        (["rayClusterConfig", "headGroupSpec", "template", "spec", "securityContext"], "runAsNonroot", True),
        (["rayClusterConfig", "workerGroupSpecs", 1], "minReplicas", "0"),
    ],
)
def test_the_crd_check_catches_a_slip(
    crd: jsonschema.Draft7Validator, path: list[str | int], name: str, value: object
) -> None:
    manifest = copy.deepcopy(MANIFEST)
    place: Any = manifest["spec"]
    for step in path:
        place = place[step]
    place[name] = value
    (error,) = crd.iter_errors(manifest)
    assert name in error.json_path + error.message


def test_the_image_the_manifest_and_the_constraints_name_one_ray() -> None:
    pinned = ray_version((ROOT / "constraints.txt").read_text(), r"^ray==(\S+)$")
    assert ray_version((CLUSTER / "Dockerfile").read_text(), r"^FROM rayproject/ray:([\d.]+)-py311-gpu$") == pinned
    assert RAY["rayVersion"] == pinned


def test_the_dockerfile_copies_what_exists_and_installs_it_constrained_as_a_user() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    let_through = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    sources = [
        word
        for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE)
        for word in line.split()[:-1]
        if word[:2] != "--"
    ]
    assert sorted(sources) == sorted(let_through)
    for source in sources:
        assert (ROOT / source).exists()
    project = (ROOT / "pyproject.toml").read_text()
    for needed in re.findall(r'^(?:readme = |license-files = \[)"([^"]+)"', project, re.MULTILINE):
        assert needed in sources
    assert re.search(r"^RUN pip install .*--constraint constraints\.txt '\.\[serve\]'$", text, re.MULTILINE)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1].split(":")[0] == str(
        pod("gpu")["securityContext"]["runAsUser"]
    )
