"""Ray's object store under pressure: what it spills stays in memory, readable to nobody else, under the launcher."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from limits import WAIT_S
from local_server import LocalServer
from remote_vae_serve.launcher import spill_directory
from samples import latents

pytestmark = pytest.mark.slow  # a server, and gigabytes through it
STORE = 120 * 10**6
EDGE = 4096
QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt", "partial_postprocess": "true"}
CLIENTS = 12


def _one_picture(config: dict[str, Any]) -> None:
    ingress = next(app for app in config["applications"] if app["name"] == "remote-vae")
    large = {
        "name": "large",
        "route_prefix": None,
        "import_path": "remote_vae_serve.app:vae",
        "args": {"source": "nowhere", "fake": {"pixels": [EDGE, EDGE]}, "num_cpus": 0},
    }
    config["applications"] = [ingress, large]


@pytest.fixture
def server() -> Iterator[LocalServer]:
    running = LocalServer(
        models=("large",),
        change=_one_picture,
        command=(sys.executable, "-m", "remote_vae_serve.cli", "run", "--proxy", "python"),
        environment={"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE), "TMPDIR": tempfile.gettempdir()},
    )
    with running:
        yield running


@pytest.mark.skipif(not spill_directory.has_room(), reason="this machine has no room in /dev/shm")
def test_what_is_spilled_stays_in_memory_for_its_owner_alone(server: LocalServer) -> None:
    """Results of 48 MiB for twelve clients at once, through a store of 120 MB."""
    began = time.time() - 1
    over = threading.Event()
    answers: list[requests.Response] = []

    def decode() -> None:
        body = latents(1, 4, 8, 8).numpy().tobytes()
        answers.append(requests.post(f"{server.url}/large", params=QUERY, data=body, timeout=WAIT_S))

    decode()
    piece = answers[0].content[-4096:-4000]
    assert len(set(piece)) > 8, "it would be found in anything"
    of_pixels: set[Path] = set()
    on_disk: set[Path] = set()

    def watch_memory() -> None:
        while not over.is_set():
            of_pixels.update(path for path in spilled(spill_directory.MEMORY) if holds(path, piece))

    def watch_disk() -> None:
        while not over.is_set():
            on_disk.update(path for path in written_since(began) if holds(path, piece))
            time.sleep(0.5)

    watching = [threading.Thread(target=watch) for watch in (watch_memory, watch_disk)]
    clients = [threading.Thread(target=decode) for _ in range(CLIENTS)]
    for thread in (*watching, *clients):
        thread.start()
    for thread in clients:
        thread.join()
    over.set()
    for thread in watching:
        thread.join()
    right = [answer.content for answer in answers if answer.status_code == 200]
    assert right, [answer.text[:200] for answer in answers]
    assert len(set(right)) == 1
    assert len(right[0]) == EDGE * EDGE * 3
    assert of_pixels, "no pixels were spilled: the store is too large for this test"
    assert not on_disk
    folders = {next(parent for parent in path.parents if parent.parent == spill_directory.MEMORY) for path in of_pixels}
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700]
    give_up = time.monotonic() + WAIT_S  # and it goes when nobody needs it, whatever else was spilled with it
    while any(holds(path, piece) for path in spilled(spill_directory.MEMORY)):
        assert time.monotonic() < give_up
        time.sleep(1)


def spilled(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names if "remote-vae-spill-" in root)


def written_since(moment: float) -> Iterator[Path]:
    """Files on a disk: in Ray's folder and in the temporary one."""
    for folder in {Path("/tmp/ray"), Path(tempfile.gettempdir())}:
        for path in folder.rglob("*"):
            try:
                if path.is_file() and path.stat().st_mtime >= moment and path.stat().st_size > 10**6:
                    yield path
            except OSError:
                continue


def holds(path: Path, piece: bytes) -> bool:
    try:
        return piece in path.read_bytes()
    except OSError:
        return False
