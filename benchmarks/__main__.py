"""What serving costs, beside its peers: `python -m benchmarks [--only 1,4] [--quick]`.

Writes benchmarks/results/serving.md, .json and .svg where all works ran, else only prints. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks import report
from benchmarks.contenders import Ours
from benchmarks.findings import Finding
from benchmarks.inside import INSIDE, real_args
from benchmarks.turns import Settings
from benchmarks.works import HTTP_WORKS, Work, real_decode

REAL_LATENTS = {"6a": 16, "6b": 32}  # 128x128 and 256x256 pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="numbers of works, with commas: 2 is 2a and 2b")
    parser.add_argument("--quick", action="store_true", help="two repetitions of a second")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for our server: a flag to try"
    )
    parser.add_argument("--out", type=Path, help="folder for the report")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that servers are stopped
    settings = Settings(args.repetitions or (2 if args.quick else 5), 1.0 if args.quick else 2.0)
    environment = dict(pair.split("=", 1) for pair in args.env)
    only = args.only.split(",") if args.only else []
    with tempfile.TemporaryDirectory() as folder:
        tiny(Path(folder))
        real = [Work(number, True, {"real": real_args(folder)}, real_decode(number, folder, latents))
                for number, latents in REAL_LATENTS.items()]  # fmt: skip
        works = [work for work in (*HTTP_WORKS, *real, *INSIDE)
                 if not only or work.number in only or work.number.rstrip("ab") in only]  # fmt: skip
        findings, failures, loads = measure(works, settings, environment)
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    findings.sort(key=lambda one: one.number)
    folder_out = args.out or (None if only or failures else Path(__file__).parent / "results")
    if folder_out is not None:
        print(report.write(findings, folder_out, command, loads))
    else:
        print(report.markdown(findings, report.circumstances(command, loads)))
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


def measure(
    works: list[Work], settings: Settings, environment: dict[str, str]
) -> tuple[list[Finding], list[str], list[float]]:
    """All works, each on a server that holds only its own models; the failed ones' numbers; load averages."""
    findings: list[Finding] = []
    failures: list[str] = []
    loads = [os.getloadavg()[0]]
    for work in works:
        print(f"work {work.number}", file=sys.stderr)
        try:
            with Ours(work.models, work.haproxy, environment, work.more) as ours:
                findings.append(work.run(ours, settings))
        except Exception:  # the others are measured all the same
            traceback.print_exc()
            failures.append(work.number)
        loads.append(os.getloadavg()[0])
    return findings, failures, loads


def tiny(folder: Path) -> None:
    """AutoencoderTiny of its real size, with random weights: speed does not depend on them."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    AutoencoderTiny().save_pretrained(folder)


if __name__ == "__main__":
    main()
