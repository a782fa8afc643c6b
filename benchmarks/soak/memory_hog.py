"""Another job, which fills the object store and more for a while: `python -m benchmarks.soak.memory_hog MIB SECONDS`."""

from __future__ import annotations

import sys
import time

import numpy as np
import ray

PIECE_MIB = 40


def main() -> None:
    mib, seconds = (float(argument) for argument in sys.argv[1:])
    ray.init("auto", namespace="soak", log_to_driver=False)
    held = [ray.put(np.ones(PIECE_MIB * 2**20, dtype=np.uint8)) for _ in range(int(mib / PIECE_MIB))]
    time.sleep(seconds)
    del held


if __name__ == "__main__":
    main()
