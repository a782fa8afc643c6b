"""Who is measured: `Ours`, a server of this checkout with a Ray of its own, and `Peer`, one of peers.py. Both are started on free
ports and stopped, with whatever they started, by process id."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import bare_serve
from remote_vae.ray_internals import DRAINING_VARIABLE, FAST_VARIABLES
from remote_vae_serve.haproxy import command as haproxy_command
from remote_vae_serve.model_paths import with_model_paths
from remote_vae_serve.published_paths import BY_INGRESS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from local_server import LocalServer, free_port  # noqa: E402

THREADS = 1
"""Of torch, for everybody: with more, on a machine of few cores, it is OpenMP's spinning against the client that is measured."""
HAPROXY = FAST_VARIABLES | (haproxy_command.variables(os.environ) or {}) | {DRAINING_VARIABLE: "1"}
"""As `remote-vae-serve run` sets them, but for the last, which only lets it stop soon."""


class Ours:
    """`with Ours(models, haproxy=True) as ours`: the ingress, and the models each at a path of its own, as under the launcher.

    Args:
        models: name to the `args` of `remote_vae_serve.app:vae`; `replicas` among them is Serve's `num_replicas`, `path` its
            `route_prefix`.
        haproxy: with the flags of `--haproxy`, or none.
        environment: more of it, such as flags that are tried.
        more: applications besides.
    """

    def __init__(
        self,
        models: Mapping[str, dict[str, Any]],
        haproxy: bool,
        environment: Mapping[str, str] | None = None,
        more: tuple[dict[str, Any], ...] = (),
    ) -> None:
        self._paths: dict[str, str | None] = {}
        applications: list[dict[str, Any]] = [
            {"name": "remote-vae", "route_prefix": "/", "import_path": "remote_vae_serve.app:ingress"}
        ]
        for name, args in models.items():
            given = {"source": "x", "device": "cpu", "num_gpus": 0} | args
            replicas = given.pop("replicas", 1)
            self._paths[name] = given.pop("path", None)
            applications.append({
                "name": name, "route_prefix": self._paths[name], "import_path": "remote_vae_serve.app:vae", "args": given,
                "deployments": [{"name": "VAE", "num_replicas": replicas}],
            })  # fmt: skip

        def change(config: dict[str, Any]) -> None:
            config["applications"] = with_model_paths({"applications": [*applications, *more]})["applications"]
            config["logging_config"] = {"enable_access_log": False}

        # HAProxy's configuration lies where every Serve of this machine would put it.
        self._folder = tempfile.TemporaryDirectory(prefix="bench-haproxy-")
        mine = {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{self._folder.name}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{self._folder.name}/admin.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": self._folder.name,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{self._folder.name}/server-state",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "PYTHONPATH": str(ROOT),
        }
        self.server = LocalServer(
            models=tuple(models),
            change=change,
            environment=(HAPROXY if haproxy else {}) | mine | dict(environment or {}),
        )

    def direct(self, model: str) -> str:
        """At the model's own path: the replica, while there is one."""
        return f"{self.server.url}{self._paths[model] or f'/{model}'}"

    def ingress(self, model: str) -> str:
        """Through the ingress, though the model has a path of its own."""
        return f"{self.server.url}{BY_INGRESS}/{model}"

    @property
    def bare(self) -> str:
        """Of an application of `bare_serve`, where it is among `more`."""
        return self.server.url + bare_serve.PATH

    @property
    def relayed(self) -> str:
        """Of the application of `bare_serve` that answers by a handle."""
        return self.server.url + bare_serve.RELAYED

    def processes(self) -> list[int]:
        return self.server.processes()

    def __enter__(self) -> Ours:
        self.server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.stop()
        self._folder.cleanup()


class Peer:
    """`with Peer("fastapi", job) as peer`: its server, at `peer.url`.

    Args:
        which: of peers.PEERS.
        job: see `job.job_of`; `shape` besides.
    """

    def __init__(self, which: str, job: Mapping[str, Any]) -> None:
        self._command = [
            sys.executable,
            "-m",
            "benchmarks.peers",
            which,
            "--job",
            json.dumps({"threads": THREADS, **job}),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}/decode"

    def __enter__(self) -> Peer:
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self._port)], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
        )
        give_up = time.monotonic() + 60
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.stop()
                raise RuntimeError(f"the peer did not come up: {' '.join(self._command)}")
            time.sleep(0.1)
        return self

    def stop(self) -> None:
        """The whole session: LitServe has workers, and a manager that outlives a SIGTERM to its parent."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
            return True
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def bare_loop(job: Mapping[str, Any], seconds: float) -> float:
    """Jobs a second of the same job in a loop, without a server."""
    spec = json.dumps({"threads": THREADS, "run_s": seconds, **job})
    command = [sys.executable, "-m", "benchmarks.peers", "loop", "--job", spec]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    return float(json.loads(written)["rate"])
