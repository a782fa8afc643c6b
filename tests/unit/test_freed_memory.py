"""What large bodies have freed goes back to the system soon after; as the kernel tells, for a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PIECES = """
import asyncio, sys
from remote_vae_serve.http import freed_memory
from remote_vae_serve.http.freed_memory import FreedMemory

freed_memory.PAUSE_S = 0.05
MIB = 2**20

def own():
    _, resident, shared, *_ = map(int, open("/proc/self/statm").read().split())
    return (resident - shared) * 4096 // MIB

async def main():
    freed, before = FreedMemory(), own()
    del [b"x" * MIB for _ in range(2)][:]  # from now on malloc has pieces of this size on its heap
    pieces = [b"x" * (MIB - 100) for _ in range(100)]
    kept = pieces[-1]  # at the heap's end, which malloc would shorten else
    del pieces
    held = own() - before
    freed.of_body(int(sys.argv[1]))
    await asyncio.sleep(0.5)
    print(held, own() - before)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_it_goes_back_after_a_large_body_and_stays_after_small_ones() -> None:
    def left(size: str) -> tuple[int, int]:
        told = subprocess.run([sys.executable, "-c", PIECES, size], capture_output=True, text=True, check=True).stdout
        held, after = map(int, told.split())
        return held, after

    held, after = left("1000")
    if held < 50:
        pytest.skip("this machine's malloc keeps nothing")
    assert after > held / 2
    assert left(str(100 * 2**20))[1] < held / 4
