"""What the number of a replica's threads and their way to wait cost on a CPU: decodes of one and of two processes at once, and
how soon a replica answers a GET at its model's path while it decodes.

    python -m benchmarks.threads [--turns 3] [--dtype bfloat16] [--latents 32] [--out benchmarks/results/threads.md]

Full-size Stable Diffusion weights (random: speed does not depend on them). Every way has its turn in each round. The second part
is under the launcher, HAProxy in front, a replica for each way; one client decodes all the time, another asks every 10 ms on one
connection. Exit code 1 where the 99th percentile of the shipped way is above its goal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from benchmarks.report import circumstances
from benchmarks.scaling import full_size_vae
from benchmarks.under_launcher import serve
from remote_vae_serve.engine.memory import malloc_cache
from remote_vae_serve.engine.threads import ENVIRONMENT, usable_cpus

GOAL_S = 0.050
TURN_S = 9.0
EVERY_S = 0.01
ANSWER_S = 300.0
SPINS = {"GOMP_SPINCOUNT": "300000"}
"""What libgomp does by itself; it counts for more than OMP_WAIT_POLICY."""
WAYS: dict[str, dict[str, str]] = {"no decode": {}, "as shipped": {}, "waiting threads spin": SPINS}


@dataclass
class Seen:
    """Of one replica: seconds of each GET and of each decode."""

    asked: list[float] = field(default_factory=list)
    decoded: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        return sorted(self.asked)[min(len(self.asked) - 1, int(share * len(self.asked)))]


def decodes(folder: str, dtype: str, latents: int, threads: int) -> None:
    """Be one of the processes: decode once, and when told so for `TURN_S`; print how many a second."""
    import torch

    from remote_vae_serve.config import VAEConfig
    from remote_vae_serve.engine.diffusers_engine import DiffusersEngine

    arguments: dict[str, Any] = {"device": "cpu", "num_gpus": 0, "dtype": dtype, "threads": threads}
    engine = DiffusersEngine(VAEConfig(source=folder, **arguments), "cpu")
    engine.load()
    batch = torch.zeros(1, 4, latents, latents, dtype=engine.dtype)
    plan, made = engine.plan_decode(tuple(batch.shape)), 0
    engine.decode(batch, plan)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    while time.perf_counter() < began + TURN_S:
        engine.decode(batch, plan)
        made += 1
    print(made / (time.perf_counter() - began), flush=True)


def rate(work: list[str], processes: int, threads: int, environment: dict[str, str]) -> float:
    """Decodes a second of so many processes together."""
    command = [sys.executable, "-m", "benchmarks.threads", "--decode", *work, str(threads)]
    variables = os.environ | malloc_cache.ENVIRONMENT | environment
    running = [
        subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    pipes = [(one.stdin, one.stdout) for one in running if one.stdin and one.stdout]
    for _, out in pipes:
        out.readline()
    for into, _ in pipes:
        into.write("\n")
        into.flush()
    return sum(float(one.communicate()[0]) for one in running)


def ask(url: str, latents: int, is_decoding: bool, seen: Seen) -> None:
    """Ask for some seconds, while a decode runs all the time or none does."""
    query, body = {"shape": [1, 4, latents, latents], "dtype": "float32"}, bytes(4 * 4 * latents * latents)
    over = threading.Event()

    def decode() -> None:
        session = requests.Session()
        while not over.is_set():
            began = time.perf_counter()
            session.post(url, params=query, data=body, timeout=ANSWER_S).raise_for_status()
            seen.decoded.append(time.perf_counter() - began)

    thread, session = threading.Thread(target=decode), requests.Session()
    if is_decoding:
        thread.start()
        time.sleep(0.2)
    until = time.perf_counter() + TURN_S
    while (began := time.perf_counter()) < until:
        session.get(url, timeout=ANSWER_S).raise_for_status()
        seen.asked.append(time.perf_counter() - began)
        time.sleep(EVERY_S)
    over.set()
    if is_decoding:
        thread.join()


def asked(source: str, dtype: str, latents: int, turns: int) -> dict[str, Seen]:
    """What each way's replica did; the first turn, which warms up, is not told."""
    names, seen = {way: way.replace(" ", "-") for way in WAYS}, {way: Seen() for way in WAYS}
    arguments = {"source": source, "device": "cpu", "num_gpus": 0, "dtype": dtype}
    models = [
        {
            "name": names[way], "route_prefix": f"/{names[way]}", "import_path": "remote_vae_serve.app:vae",
            "args": arguments, "deployments": [{"name": "VAE", "num_replicas": 1}],
            "runtime_env": {"env_vars": variables},
        } for way, variables in WAYS.items()
    ]  # fmt: skip
    with serve(models, haproxy=True) as server:
        for number in range(turns + 1):
            for way in WAYS:
                ask(f"{server.url}/{names[way]}", latents, way != "no decode", seen[way] if number else Seen())
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "threads.md")
    parser.add_argument("--decode", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        folder, dtype, latents, threads = args.decode
        decodes(folder, dtype, int(latents), int(threads))
        return
    loads, cpus = [os.getloadavg()[0]], usable_cpus()
    settings = {
        (processes, threads, how): list[float]()
        for processes in (1, 2) for threads in (cpus, max(1, cpus // 2)) for how in ("sleep", "spin")
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        full_size_vae(Path(folder))
        for _ in range(args.turns):
            for (processes, threads, how), rates in settings.items():
                environment = ENVIRONMENT if how == "sleep" else SPINS
                rates.append(rate([folder, args.dtype, str(args.latents)], processes, threads, environment))
                print(f"{processes} processes, {threads} threads, {how}: {rates[-1]:.3f} a second", flush=True)
            loads.append(os.getloadavg()[0])
        seen = asked(folder, args.dtype, args.latents, args.turns)
        loads.append(os.getloadavg()[0])
    text = report(args, loads, settings, seen)
    with args.out.open("a") as file:
        file.write(text + "\n")
    print(text)
    if seen["as shipped"].percentile(0.99) > GOAL_S:
        sys.exit(f"the 99th percentile is above {1e3 * GOAL_S:g} ms")


def report(
    args: argparse.Namespace,
    loads: list[float],
    settings: dict[tuple[int, int, str], list[float]],
    seen: dict[str, Seen],
) -> str:
    rates = [
        f"| {processes} | {threads} | {how} | {statistics.median(found):.3f} | {min(found):.3f} to {max(found):.3f} |"
        for (processes, threads, how), found in settings.items()
    ]
    waits = [
        f"| {way} | {len(one.asked)} | {1e3 * one.percentile(0.5):.1f} | {1e3 * one.percentile(0.99):.1f} | "
        f"{1e3 * max(one.asked):.0f} | {f'{statistics.median(one.decoded):.2f}' if one.decoded else ''} |"
        for way, one in seen.items()
    ]
    command = " ".join(["python -m benchmarks.threads", *sys.argv[1:]])
    return "\n".join([
        f"## {8 * args.latents}x{8 * args.latents} in {args.dtype}", "", circumstances(command, loads), "",
        f"{args.turns} turns of {TURN_S:g} s of each way.", "",
        "| processes | threads of each | those that wait | decodes a second together, median | range |",
        "|---|---|---|---|---|", *rates, "",
        "| a replica under the launcher | GETs | median, ms | 99th percentile, ms | longest, ms | a decode, median, s |",
        "|---|---|---|---|---|---|", *waits, "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
