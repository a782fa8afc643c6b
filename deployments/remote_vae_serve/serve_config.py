"""`ServeConfig`: a serve_config.yaml, read and checked before anything is started.

Serve ignores keys it does not know, and finds out about wrong arguments one application at a time while it deploys. Here
every mistake that can be seen without weights is found first, and said with the application and the key.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from remote_vae_serve.config import IngressConfig, VAEConfig
from remote_vae_serve.http.app import RESERVED
from remote_vae_serve.ingress.model_registry import NAME
from remote_vae_serve.model_paths import INGRESS, VAE

POLICY = "remote_vae_serve.scaling:YieldWhenIdle"
_ARGUMENTS: Mapping[str, type[IngressConfig] | type[VAEConfig]] = {VAE: VAEConfig, INGRESS: IngressConfig}
_DEPLOYMENTS = {VAE: "VAE", INGRESS: "Ingress"}


class InvalidConfig(ValueError):
    """The file is no configuration that can be run; `problems` has a sentence for each mistake."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class ServeConfig:
    """A configuration that can be run.

    Attributes:
        host, port: where HTTP is answered.
        has_tls: whether there is a certificate for it.
        models: the arguments of each VAE application, by its name.
        max_body_mib, request_timeout_s: of the ingress; the largest where there are several, the default where there is none.
        allow_origins: of the ingress; where there are several, those that each of them lists.
    """

    host: str
    port: int
    has_tls: bool
    models: Mapping[str, VAEConfig]
    max_body_mib: float
    request_timeout_s: float
    allow_origins: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> ServeConfig:
        """Raises InvalidConfig."""
        try:
            written = yaml.safe_load(path.read_text())
        except FileNotFoundError as error:
            raise InvalidConfig([f"{path} does not exist; `remote-vae-serve init` writes one"]) from error
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig([f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"]) from error
        except yaml.YAMLError as error:
            raise InvalidConfig([f"{path} is no YAML: {' '.join(str(error).split())}"]) from error
        if not isinstance(written, dict):
            raise InvalidConfig([f"{path} holds no mapping; expected `applications:` and a list of them"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Serve gives them again when it deploys
            problems = list(_problems(written))
        if problems:
            raise InvalidConfig(problems)
        return cls._of(written)

    @classmethod
    def _of(cls, written: Mapping[str, Any]) -> ServeConfig:
        http = HTTPOptionsSchema(**(written.get("http_options") or {}))
        applications = written["applications"]
        doors = [IngressConfig(**_arguments(app)) for app in applications if app["import_path"] == INGRESS]
        doors = doors or [IngressConfig.model_validate({})]
        return cls(
            host=http.host,
            port=http.port,
            has_tls=bool(http.ssl_certfile),
            models={app["name"]: VAEConfig(**_arguments(app)) for app in applications if app["import_path"] == VAE},
            max_body_mib=max(door.max_body_mib for door in doors),
            request_timeout_s=max(door.request_timeout_s for door in doors),
            allow_origins=tuple(o for o in doors[0].allow_origins if all(o in door.allow_origins for door in doors)),
        )


def _arguments(application: Mapping[str, Any]) -> Mapping[str, Any]:
    return application.get("args") or {}


def _problems(written: Mapping[str, Any]) -> Iterable[str]:
    yield from _unknown_keys(written, ServeDeploySchema, "")
    yield from _unknown_keys(written.get("http_options"), HTTPOptionsSchema, "http_options: ")
    try:
        ServeDeploySchema.model_validate(written)
    except ValidationError as error:
        yield from _complaints_of_schema(error, written)
        return  # what follows takes the form for granted
    except (ImportError, AttributeError):
        pass  # a policy that cannot be imported; its application is named below
    port = (written.get("http_options") or {}).get("port", 8000)
    if not 1 <= port <= 65535:
        yield f"http_options: port: {port}; expected 1 to 65535"
    names = Counter(app["name"] for app in written["applications"])
    for app in written["applications"]:
        yield from _problems_of_application(app)
    yield from (f"application {name!r}: name: {count} have it" for name, count in names.items() if count > 1)


def _problems_of_application(app: Mapping[str, Any]) -> Iterable[str]:
    name, import_path = app["name"], app["import_path"]
    where = f"application {name!r}: "
    yield from _unknown_keys(app, ServeApplicationSchema, where)
    for deployment in app.get("deployments") or []:
        yield from _problems_of_deployment(deployment, f"{where}deployments: ")
        expected = _DEPLOYMENTS.get(import_path, deployment["name"])
        if deployment["name"] != expected:
            yield f"{where}deployments: name is {deployment['name']!r}; this application has one deployment, {expected}"
    if import_path not in _ARGUMENTS:
        near = difflib.get_close_matches(import_path, _ARGUMENTS, n=1, cutoff=0.8)
        if near:  # any other path is somebody else's application, which may run beside ours
            yield f"{where}import_path: unknown {import_path!r}; did you mean {near[0]!r}?"
        return
    if import_path == VAE and name in RESERVED:
        yield f"{where}name: it is a path of the ingress; take another"
    elif import_path == VAE and not NAME.fullmatch(name):
        yield f"{where}name: a model's is of the form [a-z0-9][a-z0-9._-]*"
    try:
        arguments = _ARGUMENTS[import_path](**_arguments(app))
    except (ValidationError, TypeError) as error:
        yield from _complaints(error, f"{where}args: ")
        return
    if isinstance(arguments, VAEConfig) and arguments.num_gpus != 0 and arguments.device != "cpu":
        for deployment in app.get("deployments") or []:
            if "num_gpus" not in (deployment.get("ray_actor_options") or {"num_gpus": None}):
                yield (
                    f"{where}deployments: ray_actor_options replaces the model's own and drops its GPU; use num_gpus and "
                    "num_cpus under args, or say num_gpus there too"
                )


def _problems_of_deployment(deployment: Mapping[str, Any], where: str) -> Iterable[str]:
    yield from _unknown_keys(deployment, DeploymentSchema, where)
    yield from _unknown_keys(deployment.get("ray_actor_options"), RayActorOptionsSchema, f"{where}ray_actor_options: ")
    scaling = deployment.get("autoscaling_config")
    before = f"{where}autoscaling_config: "
    unknown = list(_unknown_keys(scaling, AutoscalingConfig, before))
    yield from unknown
    if isinstance(scaling, dict) and not unknown:
        try:
            policy = AutoscalingConfig(**scaling).policy
        except (ValueError, TypeError) as error:
            yield from _complaints(error, before)
        except (ImportError, AttributeError) as error:
            yield f"{before}policy: policy_function: {error}"
        else:
            yield from _problems_of_policy(policy, f"{before}policy: policy_kwargs: ")


def _problems_of_policy(policy: AutoscalingPolicy, where: str) -> Iterable[str]:
    """Mistakes in the arguments of our own policy: Serve would find them in its controller, again and again."""
    if policy.policy_function not in (POLICY, POLICY.replace(":", ".")):
        return
    for key, value in policy.policy_kwargs.items():
        if key not in ("idle_s", "turn_s"):
            yield f"{where}unknown argument {key!r}; known are idle_s and turn_s"
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            yield f"{where}{key} is {value!r}; expected a number of seconds"


def _unknown_keys(written: Any, schema: type[BaseModel], where: str) -> Iterable[str]:
    for key in written if isinstance(written, dict) else ():
        if key not in schema.model_fields:
            near = difflib.get_close_matches(str(key), schema.model_fields, n=1, cutoff=0.5)
            yield f"{where}unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _complaints_of_schema(error: ValidationError, written: Mapping[str, Any]) -> Iterable[str]:
    """Serve's schema says `applications, 2, name`; an operator wants that application's name."""
    for mistake in error.errors():
        keys = list(mistake["loc"])
        where = ""
        if keys[:1] == ["applications"] and len(keys) > 1 and isinstance(keys[1], int):
            app = written["applications"][keys[1]]
            name = app.get("name") if isinstance(app, dict) else None
            where = f"application {name!r}: " if name is not None else f"application number {keys[1] + 1}: "
            keys = keys[2:]
        yield where + _complaint(keys, mistake["msg"])


def _complaints(error: Exception, where: str) -> Iterable[str]:
    if isinstance(error, ValidationError):
        yield from (where + _complaint(list(mistake["loc"]), mistake["msg"]) for mistake in error.errors())
    else:
        yield f"{where}{' '.join(str(error).split())}"


def _complaint(keys: Sequence[int | str], message: str) -> str:
    path = ".".join(str(key) for key in keys if not isinstance(key, int))
    said = " ".join(message.removeprefix("Value error, ").split())
    return f"{path}: {said}" if path else said
