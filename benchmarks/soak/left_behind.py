"""What requests have left in the server's Ray and beside it, as JSON: `python -m benchmarks.soak.left_behind SECONDS`.

It waits so many seconds at most until there is as good as nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.util.state import list_actors, list_objects

from remote_vae_serve.launcher.spill_directory import MEMORY, PREFIX

LARGE = 100 * 1024
"""Bytes from which on Ray puts an object into its store, and one that nobody needs costs memory."""
LISTED = 10_000


def main() -> None:
    (seconds,) = sys.argv[1:]
    ray.init("auto", namespace="soak", log_to_driver=False)
    give_up = time.monotonic() + float(seconds)
    while any((found := left()).values()) and time.monotonic() < give_up:
        time.sleep(1)
    print(json.dumps(found))


def left() -> Mapping[str, int]:
    """Bytes of large objects that are not Serve's own, and of spilled files beyond those that can be."""
    # It takes one with two holders for a missing one.
    listed = list_objects(limit=LISTED, raise_on_missing_output=False)
    assert listed, "Ray lists nothing, not even what Serve always holds: what is left would not be seen either"
    large = [held for held in listed if held.object_size >= LARGE]
    controller = _controller()
    of_serve = {
        held.object_id: held.object_size
        for held in large
        if held.pid == controller.pid or controller.actor_id in held.object_id
    }
    of_requests = {held.object_id: held.object_size for held in large if held.object_id not in of_serve}
    spilled = 0
    for path in MEMORY.glob(f"{PREFIX}*/**/*"):
        with suppress(FileNotFoundError):
            spilled += path.stat().st_size if path.is_file() else 0
    most = sum(of_serve.values()) + len(of_serve) * LARGE // 10  # Ray writes a little about each
    return {"bytes that requests hold": sum(of_requests.values()), "spilled bytes": max(spilled - most, 0)}


def _controller() -> Any:
    """Serve's, which holds what is deployed, 0.1 MB a replica, and tells routers of it in objects that its tasks return; an
    object's identifier has that of its task's actor in it."""
    (controller,) = list_actors(filters=[("class_name", "=", "ServeController")])
    return controller


if __name__ == "__main__":
    main()
