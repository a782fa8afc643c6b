"""What is broken on purpose: one thing after the other, while requests go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from benchmarks.soak.works import DIRECT, FAKE, REAL
from benchmarks.under_launcher import LocalServer
from remote_vae.ray_internals import LOOPBACK_VARIABLES

ROOT = Path(__file__).parents[2]
STORE_MIB, SQUEEZED_S = 300, 8.0
HELD_MIB, HELD_S = 20, 8.0
BUSY_S = 18.0
FROZEN_S = 8.0
STORM, STORM_S = 50, 3.0
FAKE_DECODE_S = 0.05
HOSTILE = (
    b"GET /models HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n",
    b"POST /fake HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /fake?shape=1&shape=4&shape=8&shape=8&dtype=float32 HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n0123456789",
    b"POST /fake?shape=-1&dtype=object HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    b"POST /fake HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /fake/encode HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n\x89PNG\r\n\x1a\n",
)


@dataclass(frozen=True)
class Fault:
    """Something that happened to the server.

    Attributes:
        at: seconds since 1970.
        hit: whether there was anything to break.
    """

    name: str
    at: float
    hit: bool


def kill(*words: str) -> Callable[[LocalServer], bool]:
    """SIGKILL to one process with each of those words in its command."""

    def run(server: LocalServer) -> bool:
        hit = False
        for pid in _one_of_each(server, words):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                hit = True
        return hit

    return run


def freeze(*words: str) -> Callable[[LocalServer], bool]:
    """Processes, one of each, that fall silent for a while, and go on where they were."""

    def run(server: LocalServer) -> bool:
        pids = _one_of_each(server, words)
        for number, pause_s in ((signal.SIGSTOP, FROZEN_S), (signal.SIGCONT, 0.0)):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(pause_s)
        return bool(pids)

    return run


def _one_of_each(server: LocalServer, words: Sequence[str]) -> list[int]:
    return [pid for word in words for pid in server.processes(word)[:1]]


def storm(server: LocalServer) -> bool:
    """Many clients at once that do not wait for their answers."""
    until = time.monotonic() + STORM_S
    body = bytes(4 * 4 * 64)
    query = {"shape": [1, 4, 8, 8], "dtype": "float32"}

    def hurry() -> None:
        while time.monotonic() < until:
            with suppress(requests.RequestException):
                requests.post(f"{server.url}/fake", params=query, data=body, timeout=(1, 0.2))

    threads = [threading.Thread(target=hurry) for _ in range(STORM)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return True


def hold_bodies_back(server: LocalServer) -> bool:
    """Large bodies whose last byte does not come."""
    held = []
    for _ in range(10):
        with suppress(OSError):
            connection = _connected(server)
            size = HELD_MIB * 2**20
            head = b"POST /fake HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
            connection.sendall(head + bytes(size - 1))
            held.append(connection)
    time.sleep(HELD_S)
    for connection in held:
        connection.close()
    return bool(held)


def squeeze_memory(server: LocalServer) -> bool:
    """Another job of the cluster puts half as much again into the object store as that holds, so that Ray spills."""
    command = [sys.executable, "-m", "benchmarks.soak.memory_hog", str(STORE_MIB * 1.5), str(SQUEEZED_S)]
    return (
        subprocess.run(command, cwd=ROOT, env=joining(server), check=False, stderr=subprocess.DEVNULL).returncode == 0
    )


def keep_cores_busy(server: LocalServer) -> bool:
    """A program of somebody else's that takes all cores: nothing of ours is to be taken for dead."""
    until = f"import time; end = time.monotonic() + {BUSY_S}\nwhile time.monotonic() < end: pass"
    busy = [subprocess.Popen([sys.executable, "-c", until]) for _ in range(os.cpu_count() or 1)]
    return sum(process.wait() for process in busy) == 0


def joining(server: LocalServer) -> Mapping[str, str]:
    """The environment of a job that joins the server's Ray."""
    return {**os.environ, **server.ray_environment, **LOOPBACK_VARIABLES, "RAY_ADDRESS": server.ray_address}


def hostile(server: LocalServer) -> bool:
    """Requests that no client sends by mistake."""
    for request in HOSTILE * 5:
        with suppress(OSError), _connected(server) as connection:
            connection.sendall(request)
            connection.recv(65536)
    return True


def update(server: LocalServer) -> bool:
    """Other arguments for the models that wait: their replicas are replaced one after the other."""

    def change(config: dict[str, Any]) -> None:
        for model in config["applications"]:
            if model["name"] in (FAKE, DIRECT):
                fake = model["args"]["fake"]
                fake["decode_s"] = FAKE_DECODE_S if fake["decode_s"] != FAKE_DECODE_S else FAKE_DECODE_S + 0.01

    try:
        server.deploy(change)
    except subprocess.CalledProcessError:  # the controller is not back yet
        return False
    return True


def _connected(server: LocalServer) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=5)


def faults(haproxy: bool) -> Mapping[str, Callable[[LocalServer], bool]]:
    """Those that there are under this proxy, by name."""
    replicas = [f"ServeReplica:{model}:VAE" for model in (FAKE, DIRECT)]
    proxies = {"proxy killed": kill("ray::ProxyActor")}
    if haproxy:
        proxies = {"HAProxy killed": kill("haproxy -"), "HAProxy's manager killed": kill("ray::HAProxyManager")}
    return {
        "replica killed": kill(*replicas),
        "ingress killed": kill("ServeReplica:remote-vae:Ingress"),
        "bodies held back": hold_bodies_back,
        **proxies,
        "hostile requests": hostile,
        "replica silent": freeze(*replicas),
        "controller killed": kill("ServeController"),
        "storm": storm,
        "memory squeezed": squeeze_memory,
        "cores busy": keep_cores_busy,
        "update": update,
        "real model's replica killed": kill(f"ServeReplica:{REAL}:VAE"),
    }
