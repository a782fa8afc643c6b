"""What decoding takes on this machine's processor, this engine beside its peers, in turns: a table in benchmarks/results.

python -m benchmarks.cpu                      all works in all ordinary ways
python -m benchmarks.cpu --works sd15 --each  what each rewrite gains: the fast engine without one of them at a time
python -m benchmarks.cpu --tiny               to see that it runs; only printed
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.ways import ORDINARY, TODAY, WAYS
from benchmarks.cpu.works import WORKS, Work
from benchmarks.report import circumstances

EDGE = 2048
FAST = "fast bfloat16"
BASES = (TODAY, FAST)
"""In every group."""
AT_ONCE = 2
"""Ways besides them; at 1024x1024 each takes several GiB."""


class Worker:
    """A process that decodes one work in one way, when it is asked."""

    def __init__(self, work: str, way: str, folder: Path, tiny: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.cpu.worker", work, way, str(folder)]
        environment = os.environ | WAYS[way].environment | ({"TINY": "1"} if tiny else {})
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.way, self.times, self.peak = way, list[float](), 0
        self.began = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return dict(json.loads(line)) if line else {"failed": f"ended with {self._process.wait()}"}

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._answer()

    def decode(self) -> None:
        answer = self.ask("decode")
        self.times.append(answer["seconds"])
        self.peak = answer["peak"]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product."""
    square, times = torch.randn(EDGE, EDGE).to(dtype), []
    for _ in range(4):
        began = time.perf_counter()
        square @ square
        times.append(time.perf_counter() - began)
    return 2 * EDGE**3 / statistics.median(times[1:])


def psnr(made: torch.Tensor, reference: torch.Tensor) -> float:
    """In decibels; the peak is the range of the reference."""
    error = (made.float() - reference.float()).square().mean().item()
    return 10 * math.log10((reference.max() - reference.min()).item() ** 2 / max(error, 1e-20))


class Group:
    """A few ways in turn: all at once would not fit into memory.

    Args:
        ways: without those that are in every group, `BASES`.
    """

    def __init__(self, work: Work, ways: Sequence[str], turns: int, folder: Path, tiny: bool) -> None:
        wanted = dict.fromkeys((*BASES, *ways))
        workers = [Worker(work.name, way, folder, tiny) for way in wanted]
        self.failed = {worker.way: str(worker.began["failed"]) for worker in workers if "failed" in worker.began}
        self.workers = {worker.way: worker for worker in workers if worker.way not in self.failed}
        self.rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        for _ in range(turns):
            for dtype, found in self.rates.items():
                found.append(matmul_rate(dtype))
            for worker in self.workers.values():
                worker.decode()
        self.convolutions = self.workers[FAST].ask("convolutions").get("seconds") if FAST in self.workers else None
        for worker in workers:
            worker.end()

    def ratio(self, base: str, way: str) -> str:
        """How many times as fast as the base, turn by turn: the median, and the range."""
        if base not in self.workers:
            return ""
        both = zip(self.workers[base].times, self.workers[way].times, strict=True)
        found = sorted(theirs / mine for theirs, mine in both)
        return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"

    def share(self, way: str, flops: int) -> float:
        """Of the rate of a matrix product in that dtype."""
        dtype = torch.bfloat16 if "bfloat16" in way else torch.float32
        return flops / statistics.median(self.workers[way].times) / statistics.median(self.rates[dtype])


def measure(work: Work, ways: Sequence[str], turns: int, tiny: bool) -> list[str]:
    """Rows of the table of one work."""
    rows, others = [], [way for way in ways if way not in BASES]
    measured = work.tiny() if tiny else work
    with tempfile.TemporaryDirectory() as written:
        folder = Path(written)
        measured.save(folder)
        groups = [
            Group(work, others[at : at + AT_ONCE], turns, folder, tiny) for at in range(0, max(1, len(others)), AT_ONCE)
        ]
        made = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
    flops = measured.flops()
    for number, group in enumerate(groups):
        for way in group.workers if number == 0 else [way for way in group.workers if way not in BASES]:
            worker, times = group.workers[way], group.workers[way].times
            rows.append(
                f"| {work.title} | {way} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) | "
                f"{group.ratio(TODAY, way)} | {group.ratio(way, FAST)} | {psnr(made[way], made[TODAY]):.1f} | "
                f"{worker.peak / 2**30:.2f} | {group.share(way, flops):.2f} |"
            )
        rows += [f"| {work.title} | {way} | could not: {reason} | | | | | |" for way, reason in group.failed.items()]
    rates = {dtype: [rate for group in groups for rate in group.rates[dtype]] for dtype in groups[0].rates}
    told = ", ".join(
        f"{str(dtype)[6:]} {min(found) / 1e12:.2f} to {max(found) / 1e12:.2f}" for dtype, found in rates.items()
    )
    of_whole = [
        group.convolutions / statistics.median(group.workers[FAST].times) for group in groups if group.convolutions
    ]
    alone = f"; convolutions alone, of {FAST}: {statistics.median(of_whole):.2f} of the whole" if of_whole else ""
    return [*rows, f"| | a matrix product, TFLOP/s: {told}{alone} | | | | | | |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(ORDINARY))
    parser.add_argument("--each", action="store_true", help="the fast engine without each rewrite, too")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "cpu.md")
    args = parser.parse_args()
    ways = [*args.ways, *(way for way in WAYS if args.each and way not in ORDINARY)]
    loads, rows = [os.getloadavg()[0]], list[str]()
    for name in args.works:
        rows += measure(WORKS[name], ways, args.turns, args.tiny)
        loads.append(os.getloadavg()[0])
        print("\n".join(rows), flush=True)
    text = "\n".join([
        "# Decoding on a processor", "", circumstances(" ".join(["python -m benchmarks.cpu", *sys.argv[1:]]), loads), "",
        _processor(), "",
        f"Random weights at full size; each way in a process of its own, a few of them in turn, {TODAY} and {FAST} always among "
        f"them: {args.turns} turns after a first decode that is not counted. Medians with their range; ratios turn by turn. PSNR "
        f"against {TODAY}; its peak is the range of that. The last column is the work's operations, as diffusers does them, in "
        "that time, of the rate of a square matrix product in the same dtype and run: folded upsampling does fewer.", "",
        f"| work | way | seconds | times as fast as {TODAY} | {FAST} is times as fast | PSNR, dB | peak, GiB | of matmul |",
        "|---|---|---|---|---|---|---|---|", *rows, "",
    ])  # fmt: skip
    if not args.tiny:
        args.out.write_text(text)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {key.strip(): value.strip() for key, value in known.items()}
    units = [
        unit
        for unit in ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2")
        if unit in known.get("flags", "").split()
    ]
    return f"Processor: {known.get('model name', 'unknown')}, model {known.get('model', '?')}; {', '.join(units)}."


if __name__ == "__main__":
    main()
