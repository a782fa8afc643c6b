"""What large bodies have freed goes back to the system soon after; as the kernel tells, for a process of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from remote_vae_serve.http import freed_memory

START = """
import asyncio, sys
from remote_vae_serve.http import freed_memory
from remote_vae_serve.http.freed_memory import LARGE, FreedMemory

freed_memory.PAUSE_S = 0.05
MIB = 2**20

def own():
    _, resident, shared, *_ = map(int, open("/proc/self/statm").read().split())
    return (resident - shared) * 4096 // MIB
"""
PIECES = f"""{START}
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


ON_A_THREAD = f"""{START}
def body():
    del [b"x" * (30 * MIB)][:]  # from now on malloc has pieces of this size on this thread's heap, and keeps twice as much
    del [b"x" * (MIB - 100) for _ in range(50)][:]

async def main():
    freed, before = FreedMemory(), own()
    for _ in range(2):
        await asyncio.to_thread(body)
        if sys.argv[1] == "told":
            freed.of_body(LARGE)
        await asyncio.sleep(0.3)
    print(own() - before)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_it_goes_back_from_the_end_of_another_threads_heap_too() -> None:
    def left(told: str) -> int:
        return int(subprocess.run([sys.executable, "-c", ON_A_THREAD, told], capture_output=True, check=True).stdout)

    if (kept := left("not told")) < 25:
        pytest.skip("this machine's malloc keeps nothing")
    assert left("told") < kept / 2


@pytest.mark.parametrize(("heaps", "called"), [("1", ["malloc_trim"]), ("2", ["mallopt", "malloc_trim"])])
def test_a_process_with_one_heap_keeps_its_own_choice(
    heaps: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(freed_memory, "PAUSE_S", 0.0)
    monkeypatch.setattr(freed_memory, "_of_glibc", lambda function, *_: asked.append(function))
    monkeypatch.setenv("MALLOC_ARENA_MAX", heaps)

    async def two_bodies() -> None:
        freed = freed_memory.FreedMemory()
        for _ in range(2):
            freed.of_body(freed_memory.LARGE)
        await asyncio.sleep(0.1)
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(two_bodies())
    assert asked == called
