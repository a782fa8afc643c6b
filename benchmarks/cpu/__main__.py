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
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.ways import ORDINARY, REFERENCE, TODAY, WAYS
from benchmarks.cpu.works import WORKS, Work
from benchmarks.report import circumstances

EDGE = 2048
BASES = (REFERENCE, TODAY)
FAST = "fast bfloat16"


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


def measure(work: Work, ways: tuple[str, ...], turns: int, tiny: bool) -> list[str]:
    """Rows of the table of one work."""
    with tempfile.TemporaryDirectory() as written:
        folder = Path(written)
        (work.tiny() if tiny else work).save(folder)
        workers = [Worker(work.name, way, folder, tiny) for way in ways]
        able = [worker for worker in workers if "ready" in worker.began]
        rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        for _ in range(turns):
            for dtype, found in rates.items():
                found.append(matmul_rate(dtype))
            for worker in able:
                worker.decode()
        alone = {worker.way: worker.ask("convolutions").get("seconds") for worker in able if worker.way == FAST}
        made = {worker.way: torch.load(folder / f"{worker.way}.pt") for worker in able}
        for worker in workers:
            worker.end()
    flops = (work.tiny() if tiny else work).flops()
    rows, by_way = [], {worker.way: worker for worker in able}
    for worker in workers:
        if worker not in able:
            rows.append(f"| {work.title} | {worker.way} | could not: {worker.began['failed']} | | | | | |")
            continue
        dtype = torch.bfloat16 if "bfloat16" in worker.way else torch.float32
        seconds = statistics.median(worker.times)
        ratios = [_ratio(by_way.get(base), worker) for base in BASES]
        loss = f"{psnr(made[worker.way], made[REFERENCE]):.1f}" if REFERENCE in made else ""
        share = flops / seconds / statistics.median(rates[dtype])
        note = f"; its convolutions alone {alone[worker.way]:.2f} s" if alone.get(worker.way) else ""
        rows.append(
            f"| {work.title} | {worker.way} | {seconds:.2f} ({min(worker.times):.2f} to {max(worker.times):.2f}){note} | "
            f"{' | '.join(ratios)} | {loss} | {worker.peak / 2**30:.2f} | {share:.2f} |"
        )
    told = ", ".join(f"{str(dtype)[6:]} {statistics.median(found) / 1e12:.2f}" for dtype, found in rates.items())
    return [*rows, f"| | matmul, TFLOP/s: {told} | | | | | | |"]


def _ratio(base: Worker | None, worker: Worker) -> str:
    """How many times as fast, turn by turn: the median."""
    if base is None:
        return ""
    return f"{statistics.median(theirs / mine for theirs, mine in zip(base.times, worker.times, strict=True)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(ORDINARY))
    parser.add_argument("--each", action="store_true", help="the fast engine without each rewrite, too")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "cpu.md")
    args = parser.parse_args()
    ways = tuple(args.ways) + (tuple(way for way in WAYS if way not in ORDINARY) if args.each else ())
    loads, rows = [os.getloadavg()[0]], list[str]()
    for name in args.works:
        rows += measure(WORKS[name], ways, args.turns, args.tiny)
        loads.append(os.getloadavg()[0])
        print("\n".join(rows), flush=True)
    text = "\n".join([
        "# Decoding on a processor", "", circumstances(" ".join(["python -m benchmarks.cpu", *sys.argv[1:]]), loads), "",
        _processor(), "",
        f"Random weights at full size; each way in a process of its own, all of a work's in turn, {args.turns} turns after a "
        "first decode that is not counted; medians, and of ratios the median of the turns'. PSNR against diffusers in float32; "
        "its peak is the range of that. The last column is the work's operations, as diffusers does them, in that time, of the "
        "rate of a square matrix product in the same dtype and run: folded upsampling does fewer, so that it may pass 1.", "",
        "| work | way | seconds | times as fast as diffusers | as eager float32 | PSNR, dB | peak, GiB | of the matmul rate |",
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
