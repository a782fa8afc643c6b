"""`remote-vae-serve run` under a Serve that ignores our middleware: no stranger is ever served, and soon nobody at all.

Serve is sabotaged in its own processes, by a `sitecustomize` that takes the middleware from one of its modules.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from haproxy_binary import why_no_haproxy
from local_server import LocalServer, ServerFailed, living

TOKEN = "s3cret-of-the-test"
SABOTAGE = """
import importlib.abc, importlib.machinery, os, sys

class Sabotage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "ray.serve._private." + os.environ["SABOTAGED"]:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def without(module):
            run(module)
            module.configure_http_middlewares = lambda options: options
        spec.loader.exec_module = without
        return spec

sys.meta_path.insert(0, Sabotage())
"""


@dataclass
class Watcher:
    """Knocks with and without the token while the server starts.

    Attributes:
        server: the process that was started.
        strangers, guests: the statuses that were answered without a token, and with one.
    """

    server: LocalServer
    process: subprocess.Popen[bytes] | None = None
    pids: set[int] = field(default_factory=set)
    strangers: set[int] = field(default_factory=set)
    guests: set[int] = field(default_factory=set)

    def knock(self) -> None:
        self.process = self.process or self.server._process
        self.pids |= set(self.server.processes())
        for statuses, headers in ((self.strangers, {}), (self.guests, {"authorization": f"Bearer {TOKEN}"})):
            for path in ("models", "fake"):
                with suppress(requests.RequestException):
                    statuses.add(requests.get(f"{self.server.url}/{path}", headers=headers, timeout=5).status_code)


def change(config: dict[str, Any]) -> None:
    ingress = next(app for app in config["applications"] if app["name"] == "remote-vae")
    args = {"source": "nowhere", "fake": {"decode_s": 0}, "num_cpus": 0}
    model = {"name": "fake", "route_prefix": "/fake", "import_path": "remote_vae_serve.app:vae", "args": args}
    config["applications"] = [ingress, model]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotaged", "proxy"), [("proxy", "python"), ("replica", "haproxy")], ids=["proxy", "replica"]
)
def test_with_tokens_that_serve_would_not_ask_for_nothing_is_served(sabotaged: str, proxy: str, tmp_path: Path) -> None:
    if proxy == "haproxy" and (reason := why_no_haproxy()) is not None:
        pytest.skip(reason)
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "SABOTAGED": sabotaged,
    }
    command = (sys.executable, "-m", "remote_vae_serve.cli", "run", "--token", TOKEN, "--proxy", proxy)
    server = LocalServer(models=("fake",), change=change, command=command, token=TOKEN, environment=environment)
    watcher = Watcher(server)
    try:
        server.start(tick=watcher.knock)
        # Where it came up, a replica was listening for a moment before it was asked.
        assert watcher.process is not None
        watcher.process.wait(60)
        said = server.log.read_text(errors="replace")
    except ServerFailed as failed:
        said = str(failed)
    finally:
        server.stop()
    assert watcher.process is not None
    assert watcher.process.returncode == 1
    assert "answers without remote-vae's middleware, so REMOTE_VAE_TOKENS would not be enforced" in said
    assert 200 not in watcher.strangers
    if sabotaged == "proxy":  # it was asked before there was an application
        assert 200 not in watcher.guests
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/models", headers={"authorization": f"Bearer {TOKEN}"}, timeout=5)
    assert watcher.pids
    assert not living(watcher.pids)
