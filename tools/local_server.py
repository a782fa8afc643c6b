"""A server of one's own on this machine: `serve run` on free ports with a Ray of its own, stopped without a trace.

For `make demo` and for the tests of the shipped configuration.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import requests
import yaml

from remote_vae.ray_internals import PORT_VARIABLES

CONFIG = Path(__file__).parents[1] / "serve_config.yaml"
DRAIN_S = 60.0
"""The launcher lets requests in flight finish, and HAProxy forget what it knew."""
STOP_S = 20.0
RAY_WAS_LATE = "node timed out during startup"
"""Ray gives a node 30 s to come up, which no setting changes; beside other work it may take longer once."""


class ServerFailed(RuntimeError):
    """The server did not come up; the end of its log is in the message."""


PORTS = range(20_000, 32_000)
"""Below those that the kernel gives to whoever asks for any: one that is chosen here is still free when a server has come up."""


def free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerFailed(f"All ports from {PORTS.start} to {PORTS.stop} are taken")


class LocalServer:
    """`with LocalServer() as server:` runs the given configuration; `server.url` is its address.

    Args:
        config: a Serve config; host and port in it are replaced.
        models: which of its models to wait for.
        change: edits the parsed config before it is used.
        command: what starts it; the config's path is put at its end.
        token: sent when asking whether it is ready.
        environment: more of it, for the server's processes.
    """

    def __init__(
        self,
        config: Path = CONFIG,
        models: tuple[str, ...] = ("demo",),
        change: Callable[[dict[str, Any]], None] = lambda _: None,
        command: tuple[str, ...] = ("serve", "run", "--address", "local"),
        token: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._config = yaml.safe_load(config.read_text())
        self._config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
        change(self._config)
        self._models = models
        self._command = command
        # Several start at once, and the launcher's choice holds for those that listen already.
        self._environment = {variable: str(free_port()) for variable in PORT_VARIABLES} | dict(environment or {})
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._folder = tempfile.TemporaryDirectory(prefix="remote-vae-")
        self._sessions: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._config['http_options']['port']}"
        self.ray_address = f"127.0.0.1:{free_port()}"
        # What another process needs to join this Ray. Ray asks for a token on both sides, and a driver that does not set
        # the mode sends none.
        self.ray_environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    @property
    def log(self) -> Path:
        return Path(self._folder.name) / "server.log"

    def start(self, tick: Callable[[], None] = lambda: None, timeout_s: float = 400) -> None:
        """Start it and wait until its models are ready, calling `tick` now and then. Raises ServerFailed."""
        give_up = time.monotonic() + timeout_s
        self._launch()
        while not self._ready():
            if self._has_ended() or time.monotonic() > give_up:
                tail = self.log.read_text(errors="replace")[-3000:]
                if RAY_WAS_LATE in tail and time.monotonic() < give_up:
                    self._end()
                    self._launch()
                    continue
                self.stop()
                raise ServerFailed(f"The server did not come up within {timeout_s:g} s. The end of its log:\n{tail}")
            tick()
            time.sleep(0.25)

    def _launch(self) -> None:
        written = Path(self._folder.name) / "serve_config.yaml"
        written.write_text(yaml.safe_dump(self._config))
        environment = (
            os.environ
            | self.ray_environment
            | self._environment
            | {
                "RAY_GCS_SERVER_PORT": self.ray_address.split(":")[1],
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            }
        )
        environment.pop("RAY_ADDRESS", None)  # a Ray of its own, whatever Ray runs already
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command, str(written)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self._sessions = {self._process.pid}

    def configuration(self) -> dict[str, Any]:
        """A copy of what it serves."""
        return copy.deepcopy(self._config)

    def deploy(self, change: Callable[[dict[str, Any]], None]) -> None:
        """`serve deploy` of its configuration, changed; Serve rolls the update out by itself."""
        change(self._config)
        written = Path(self._folder.name) / "changed.yaml"
        written.write_text(yaml.safe_dump(self._config))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", "--address", self.dashboard, str(written)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | self.ray_environment)

    @property
    def dashboard(self) -> str:
        """The URL of its Ray's dashboard, which Ray says at its start."""
        return re.findall(r"http://127\.0\.0\.1:\d+", self.log.read_text())[0]  # type: ignore[no-any-return]

    @property
    def launched(self) -> subprocess.Popen[bytes]:
        """What was started, by the command."""
        assert self._process is not None
        return self._process

    def _has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """SIGTERM, which ends Serve and its Ray; then SIGKILL for whatever of its session is left."""
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        if self._process is not None:
            self.processes()  # once it has ended nobody can tell whose child was whose
            # `serve run` started from a script ignores SIGINT; SIGTERM it obeys, within seconds.
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DRAIN_S)
            give_up = time.monotonic() + STOP_S
            while (left := self.processes()) and time.monotonic() < give_up:
                time.sleep(0.1)
            for pid in left:
                _kill(pid)
            self._process.wait()
            self._process = None

    def processes(self, words: str = "") -> list[int]:
        """The live processes of the server, its Ray and its replicas included: those with `words` in their command.

        They are in the session of what was started, or of a child of that: the launcher gives its server one of its own.
        """
        if self._process is None:
            return []
        found = _living()
        self._sessions |= {process.session for process in found if process.parent == self._process.pid}
        return [process.pid for process in found if process.session in self._sessions and words in process.command]

    def _ready(self) -> bool:
        try:
            models = requests.get(f"{self.url}/models", headers=self._headers, timeout=5).json()["models"]
        except (requests.RequestException, ValueError, KeyError):
            return False
        ready = {model["name"] for model in models if model["state"] == "ready"}
        return ready >= set(self._models)

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def living(pids: Iterable[int]) -> list[int]:
    """Those of the processes that live; one that is dead and only not yet buried does not."""
    alive = {process.pid for process in _living()}
    return [pid for pid in pids if pid in alive]


def descendants(pid: int) -> list[int]:
    """The live processes that a process has started, and those that these have."""
    found = _living()
    below, level = [], {pid}
    while level := {process.pid for process in found if process.parent in level}:
        below += sorted(level)
    return below


class Process(NamedTuple):
    """A process of this machine."""

    pid: int
    parent: int
    session: int
    command: str


def _living() -> list[Process]:
    """Every live process of this machine."""
    # -ww: where COLUMNS is set, ps cuts its lines there, and a command with a long path loses its end.
    columns = ["ps", "-e", "-ww", "-o", "pid=,ppid=,sess=,stat=,args="]
    listing = subprocess.run(columns, capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=4) for line in listing.stdout.splitlines()]
    return [
        Process(int(pid), int(parent), int(session), command)
        for pid, parent, session, state, command in rows
        if state[0] != "Z"
    ]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
