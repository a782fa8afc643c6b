"""Latents through a Ray handle, from an actor: ours, and a plain Serve call that takes a numpy array. A process of its own, since
one joins a Ray for good: `python -m benchmarks.handles <address> <model> <calls> <repetitions>` writes JSON.

No `from __future__ import annotations`: Serve reads a builder's annotations as they stand.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray import serve

SHAPE = (1, 4, 1600, 2048)  # 50 MiB of float32
SMALL = (1, 4, 8, 8)  # 64 x 64 pixels, 12 KiB
PLAIN = {"name": "plain", "route_prefix": None, "import_path": "benchmarks.handles:plain"}


class Plain:
    """Takes an array and tells its size; or reads it, as who decodes it has to: what one process shares with another is brought
    in page by page when it is first read."""

    async def __call__(self, array: Any) -> int:
        return int(array.nbytes)

    async def read(self, array: Any) -> float:
        return float(array.sum())

    async def picture(self, array: Any) -> Any:
        """As many bytes as a small picture has."""
        import numpy as np

        return np.zeros((1, 8 * array.shape[-2], 8 * array.shape[-1], 3), np.uint8)


def plain(args: dict[str, Any]) -> serve.Application:
    options = {"ray_actor_options": {"num_cpus": 0.1}}
    return serve.deployment(Plain, name="Plain", **options).bind()


class Caller:
    """A generator's stand-in: an async actor that has latents."""

    async def times(self, model: str, calls: int, repetitions: int) -> dict[str, Any]:
        """Milliseconds by way: the median of the calls of each repetition, in turn."""
        import torch

        from remote_vae import AsyncRemoteVAE

        latents, small = torch.randn(SHAPE), torch.randn(SMALL)
        while "plain" not in serve.status().applications or serve.status().applications["plain"].status != "RUNNING":
            await asyncio.sleep(0.2)
        handle, vae = serve.get_app_handle("plain"), AsyncRemoteVAE.from_app(model)

        async def ours() -> Any:
            return await vae.decode(latents, do_scaling=False, output_type="pt", partial_postprocess=True)

        async def plainly() -> Any:
            return await handle.remote(latents.numpy())

        async def read() -> Any:
            return await handle.read.remote(latents.numpy())

        async def ours_small() -> Any:
            return await vae.decode(small, do_scaling=False, output_type="pt", partial_postprocess=True)

        async def plainly_small() -> Any:
            return await by_value.picture.remote(small.numpy())

        async def plainly_by_reference() -> Any:
            return await by_reference.picture.remote(small.numpy())

        by_value, by_reference = (handle.options(_by_reference=way) for way in (False, True))
        ways: dict[str, Callable[[], Awaitable[Any]]] = {
            "ours": ours, "plain": plainly, "read": read, "ours small": ours_small, "plain small": plainly_small,
            "plain small by reference": plainly_by_reference,
        }  # fmt: skip
        found: dict[str, list[float]] = {name: [] for name in ways}
        for repetition in range(repetitions + 1):
            for name, call in ways.items():
                took = []
                for _ in range(calls):
                    began = time.perf_counter()
                    await call()
                    took.append((time.perf_counter() - began) * 1000)
                if repetition:  # the first warms up
                    found[name].append(statistics.median(took))
        return found


async def main() -> None:
    address, model, calls, repetitions = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    caller = ray.remote(Caller).options(num_cpus=0).remote()
    print(json.dumps(await asyncio.wait_for(caller.times.remote(model, calls, repetitions), 180)))


if __name__ == "__main__":
    asyncio.run(main())
