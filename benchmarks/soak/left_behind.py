"""What requests have left in the server's Ray and beside it, as JSON: `python -m benchmarks.soak.left_behind BYTES SECONDS`.

It waits so many seconds at most until it is no more than so many bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping

import ray

from remote_vae_serve.launcher.spill_directory import MEMORY, PREFIX


def main() -> None:
    most, seconds = (float(argument) for argument in sys.argv[1:])
    ray.init("auto", namespace="soak", log_to_driver=False)
    give_up = time.monotonic() + seconds
    while sum((found := left()).values()) > most and time.monotonic() < give_up:
        time.sleep(1)
    print(json.dumps(found))


def left() -> Mapping[str, int]:
    store = "object_store_memory"
    used = ray.cluster_resources()[store] - ray.available_resources().get(store, 0.0)
    spilled = sum(path.stat().st_size for path in MEMORY.glob(f"{PREFIX}*/**/*") if path.is_file())
    return {"bytes in the object store": int(used), "spilled bytes": spilled}


if __name__ == "__main__":
    main()
