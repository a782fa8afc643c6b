"""Two replicas, one with long work before it: short work does not queue behind it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from ray import serve

from conftest import Cluster
from limits import stretched
from remote_vae import RemoteVAE

SMALL, LARGE = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 64, 512)
LARGE_S = 8.0
A_MEGAPIXEL_S = LARGE_S / 2


def test_short_work_goes_to_the_replica_that_is_free(bare_cluster: Cluster) -> None:
    bare_cluster.deploy(
        "mixed",
        source="nowhere",
        fake={"seconds_per_megapixel": A_MEGAPIXEL_S},
        num_cpus=0,
        options={"num_replicas": 2},
    )
    bare_cluster.wait_for_replicas("mixed", 2)
    waits: list[float] = []

    with RemoteVAE(f"{bare_cluster.url}/mixed", workers=8) as vae, ThreadPoolExecutor(8) as pool:

        def small(_: int) -> None:
            began = time.perf_counter()
            vae.decode(SMALL)
            waits.append(time.perf_counter() - began)

        list(pool.map(small, range(16)))  # both replicas learn how long work takes
        waits.clear()
        began = time.perf_counter()
        large = vae.submit(LARGE)
        time.sleep(0.5)
        list(pool.map(small, range(64)))
        large.result()
    assert LARGE_S < time.perf_counter() - began < stretched(3 * LARGE_S)
    # Behind the large one it would be seven seconds: without the handing back, a fourth of them and more.
    assert sorted(waits)[len(waits) * 95 // 100] < stretched(LARGE_S / 2)
    serve.delete("mixed")
