"""What each model's decode takes on this machine's GPU, as tables and as JSON; no network, no Ray.

    python -m benchmarks.gpu                          all of it, to benchmarks/results/<card>.json and .md
    python -m benchmarks.gpu --budget-s 540 --resume  what can be done in nine minutes, going on where the last run ended
    python -m benchmarks.gpu --finish --out NAME      predictions that NAME.json still lacks; on any machine
    python -m benchmarks.gpu --device cpu --tiny      tiny models on the CPU, to see that it runs; only printed

Exit status 1: a decode that should be a rounding away from float32 is not.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.decodes import WAYS, Bench, Compiler, free_memory, is_wrong
from benchmarks.gpu.models import MODELS, tiny
from benchmarks.gpu.results import ROOT, Results, about_machine, slug, write
from benchmarks.gpu.tables import render
from benchmarks.gpu.works import Work, works


class OutOfTime(BaseException):
    """The budget is spent. No Exception: torch.compile and the works themselves catch those."""


@contextmanager
def ending_at(deadline: float | None) -> Iterator[None]:
    """Raises OutOfTime in the block at that moment of time.monotonic(), whatever is being done."""

    def stop(number: int, frame: object) -> None:
        raise OutOfTime

    if deadline is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def do(work: Work, bench: Bench) -> dict[str, Any]:
    """What it found, or why it could not: a decoder that does not compile, or does not fit, is a result like any other."""
    try:
        return work.measure(bench)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0][:300]}"}
    finally:
        free_memory(bench.device)


def run(planned: list[Work], bench: Bench, results: Results, deadline: float | None, page: Path | None) -> int:
    """Do what is not done yet, writing each result down. Returns how many works are left."""
    pending = [work for work in planned if work.key not in results.records]
    pending.sort(key=lambda work: work.key in results.interrupted)
    for number, work in enumerate(pending):
        began = time.monotonic()
        try:
            with ending_at(deadline):
                record = do(work, bench)
        except OutOfTime:
            results.interrupt(work.key)
            print(f"{work.key}: time is up after {time.monotonic() - began:.1f} s", flush=True)
            return len(pending) - number
        results.add(work.key, record)
        print(f"{work.key}: {time.monotonic() - began:.1f} s{said(record)}", flush=True)
        if page is not None:
            write(page, render(results))
    return 0


def said(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f", failed: {record['failed']}"
    milliseconds = record.get("ms") or record.get("whole_ms")
    return f", {milliseconds['median']:.3f} ms" if milliseconds else ""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [model.name for model in MODELS]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="narrow models, small pictures, torch.compile without a code generator"
    )
    parser.add_argument("--only", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument(
        "--compile-mode", default="default", help="of torch.compile: default, reduce-overhead, max-autotune ..."
    )
    parser.add_argument("--budget-s", type=float, help="seconds after which it stops, with what it has")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, and do the rest")
    parser.add_argument("--finish", action="store_true", help="only predictions, for results of whatever machine")
    parser.add_argument("--out", type=Path, help="path of the results without .json (default: by the card's name)")
    parser.add_argument("--commit", help="of this checkout, where there is no git")
    chosen = parser.parse_args()
    for given, known in ((chosen.only, names), (chosen.ways, list(WAYS))):
        for name in given.split(","):
            if name not in known:
                parser.error(f"{name!r} is none of {', '.join(known)}")
    if chosen.finish and chosen.out is None:
        parser.error("--finish needs the results to finish: --out")
    if not chosen.finish and chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny shows that the benchmark runs")
    return chosen


def main() -> int:
    began, chosen = time.monotonic(), options()
    json_file = None if chosen.out is None else Path(f"{chosen.out}.json")
    if chosen.finish:
        assert json_file is not None
        results = Results.read(json_file)
        device, is_tiny = "cpu", bool(results.about["tiny"])
    else:
        device, is_tiny = chosen.device, chosen.tiny
        about = about_machine(device, chosen.commit)
        about |= {"device": device, "tiny": is_tiny, "compile_mode": chosen.compile_mode}
        if json_file is None and device == "cuda" and not is_tiny:
            json_file = ROOT / "benchmarks" / "results" / f"{slug(about['card'])}.json"
        results = Results.resumed(json_file, about) if chosen.resume and json_file else Results(json_file, about)
    page = None if json_file is None else Path(f"{str(json_file).removesuffix('.json')}.md")
    compiler = Compiler("eager") if is_tiny else Compiler(mode=chosen.compile_mode)
    bench = Bench(
        device, Clock(device, least=2, most=3, seconds=0.1, warm_up_s=0) if is_tiny else Clock(device), compiler
    )
    models = [tiny(model) if is_tiny else model for model in MODELS if model.name in chosen.only.split(",")]
    planned = works(models, chosen.ways.split(","), device, is_tiny)
    planned = [work for work in planned if not (chosen.finish and work.on_device)]
    deadline = None if chosen.budget_s is None else began + chosen.budget_s
    left = run(planned, bench, results, deadline, page)
    text = render(results)
    if page is not None:
        write(page, text)
        results.save()
    print(f"\n{text}")
    if left:
        print(f"{left} of {len(planned)} are left: run it again with --resume.")
    # A tiled decode differs by its seams, not by rounding.
    wrong = [key for key, record in results.records.items() if key.endswith("/whole") and is_wrong(record)]
    for key in wrong:
        print(f"{key}: far from float32: {results.records[key]['difference']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
