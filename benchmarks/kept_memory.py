"""What it spares a CPU's decode that memory is kept from one to the next: the engine in processes that can keep it and in others,
in turn, on full-size Stable Diffusion weights (random: speed does not depend on them).

    python -m benchmarks.kept_memory [--turns 3] [--out benchmarks/results/kept_memory.md]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import circumstances
from benchmarks.scaling import full_size_vae
from remote_vae_serve.engine.memory.malloc_cache import ENVIRONMENT

LATENTS = (32, 64)
DECODES = 3
WAYS = {"given back": {}, "kept": ENVIRONMENT}


def decodes(folder: str, latents: int) -> list[tuple[float, int]]:
    """Seconds and page faults of each decode after the first."""
    import torch

    from remote_vae_serve.config import VAEConfig
    from remote_vae_serve.engine.diffusers_engine import DiffusersEngine

    engine = DiffusersEngine(VAEConfig(source=folder, device="cpu", num_gpus=0), "cpu")
    engine.load()
    batch, found = torch.zeros(1, 4, latents, latents), []
    for _ in range(DECODES):
        began, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        engine.decode(batch, engine.plan_decode(tuple(batch.shape)))
        found.append((time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    return found[1:]


def in_a_process(folder: str, latents: int, environment: dict[str, str]) -> list[tuple[float, int]]:
    command = [sys.executable, "-m", "benchmarks.kept_memory", "--decode", folder, str(latents)]
    inherited = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    written = subprocess.run(command, env=inherited | environment, stdout=subprocess.PIPE, check=True).stdout
    return [(seconds, faults) for seconds, faults in json.loads(written)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kept_memory.md")
    parser.add_argument("--decode", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        print(json.dumps(decodes(args.decode[0], int(args.decode[1]))))
        return
    rows, loads = [], [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        full_size_vae(Path(folder))
        for latents in LATENTS:
            turns: dict[str, list[list[tuple[float, int]]]] = {way: [] for way in WAYS}
            for _ in range(args.turns):
                for way, environment in WAYS.items():
                    turns[way].append(in_a_process(folder, latents, environment))
                loads.append(os.getloadavg()[0])
            medians = {
                way: [statistics.median(one[0] for one in turn) for turn in found] for way, found in turns.items()
            }
            for way, found in turns.items():
                ratios = [mine / theirs for mine, theirs in zip(medians[way], medians["given back"], strict=True)]
                faults = statistics.median(one[1] for turn in found for one in turn)
                rows.append(
                    f"| {8 * latents}x{8 * latents} | {way} | {statistics.median(medians[way]):.2f} | "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {faults:,.0f} |"
                )
    command = " ".join(["python -m benchmarks.kept_memory", *sys.argv[1:]])
    text = "\n".join([
        "# Memory kept from one decode to the next", "", circumstances(command, loads), "",
        f"Stable Diffusion's VAE at its full size in float32, all cores; {args.turns} turns, each way in a process of its own, "
        f"{DECODES - 1} decodes after a first one. A page is 4 KiB, which the kernel clears.", "",
        "| picture | freed memory is | median, s | of the time where it is given back | pages touched anew |",
        "|---|---|---|---|---|", *rows, "",
    ])  # fmt: skip
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
