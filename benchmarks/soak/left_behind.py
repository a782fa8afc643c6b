"""What requests have left in the server's Ray and beside it: `python -m benchmarks.soak.left_behind`, which prints JSON."""

from __future__ import annotations

import json

import ray

from remote_vae_serve.launcher.spill_directory import MEMORY, PREFIX


def main() -> None:
    ray.init("auto", namespace="soak", log_to_driver=False)
    store = "object_store_memory"
    used = ray.cluster_resources()[store] - ray.available_resources().get(store, 0.0)
    spilled = sum(path.stat().st_size for path in MEMORY.glob(f"{PREFIX}*/**/*") if path.is_file())
    print(json.dumps({"bytes in the object store": int(used), "spilled bytes": spilled}))


if __name__ == "__main__":
    main()
