"""A process that decodes one work in one way, each time that a line says so: `python -m benchmarks.cpu.worker WORK WAY FOLDER`.

Its answers are lines of JSON: seconds of each decode; at the end what it took at its peak. The pixels it leaves in the folder.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cpu.ways import WAYS, Decode
from benchmarks.cpu.works import WORKS

TIMES = 3


class Convolutions(TorchDispatchMode):
    """The convolutions that a decode calls, with the shapes of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, str]] = Counter()
        self.arguments: dict[tuple[Any, str], Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "conv" in str(func):
            key = func, repr([tuple(one.shape) if isinstance(one, torch.Tensor) else one for one in args])
            self.calls[key] += 1
            if key not in self.arguments:
                self.arguments[key] = [
                    torch.empty_like(one).normal_() if isinstance(one, torch.Tensor) else one for one in args
                ]
        return func(*args, **(kwargs or {}))

    def seconds(self) -> float:
        """Of all of them, each shape timed by itself."""
        total = 0.0
        for (func, key), count in self.calls.items():
            arguments, times = self.arguments.pop((func, key)), []
            for _ in range(TIMES + 1):
                began = time.perf_counter()
                func(*arguments)
                times.append(time.perf_counter() - began)
            total += count * sorted(times[1:])[TIMES // 2]
        return total


def of_convolutions(decode: Decode, latents: torch.Tensor) -> float:
    with torch.inference_mode(), Convolutions() as found:
        decode(latents)
    with torch.inference_mode():
        return found.seconds()


def main() -> None:
    name, way, folder = sys.argv[1:4]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    work = WORKS[name].tiny() if os.environ.get("TINY") else WORKS[name]
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too

    def tell(answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    latents = work.latents()
    began = time.perf_counter()
    try:
        decode = WAYS[way].load(Path(folder), latents)
        with torch.inference_mode():
            pixels = decode(latents)
    except Exception as error:  # a peer that cannot is a result like any other
        tell({"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"})
        return
    tell({"ready": time.perf_counter() - began})
    torch.save(pixels, Path(folder) / f"{way}.pt")
    del pixels
    for line in sys.stdin:
        if line.strip() == "convolutions":
            tell({"seconds": of_convolutions(decode, latents)})
            continue
        with torch.inference_mode():
            began = time.perf_counter()
            decode(latents)
            tell(
                {
                    "seconds": time.perf_counter() - began,
                    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                }
            )


if __name__ == "__main__":
    main()
