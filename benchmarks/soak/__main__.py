"""`make soak`: a real server under the launcher, clients of three kinds, and a fault every so often; a report at the end.

    python -m benchmarks.soak [--minutes 30] [--every 20] [--haproxy] [--strict] [--only "ingress killed"] [--out soak.md]

Exit code 1 where our client or a handle lost anything, anybody got other pixels or no answer, a process of ours grows, or an
object or a spilled file is left; with --strict also where a silence was too long, or a plain client lost what nobody had killed,
which a busy machine can bring about.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.soak import report
from benchmarks.soak.clients import DEADLINE_S, TRY_S, Clients, ours, plain
from benchmarks.soak.faults import FAKE_DECODE_S, ROOT, STORE_MIB, Fault, faults, joining
from benchmarks.soak.outcomes import Answer, Outcome
from benchmarks.soak.processes import Watch, holdings
from benchmarks.soak.works import DIRECT, DOORS, FAKE, REAL, works
from benchmarks.under_launcher import LocalServer, fake_model, serve
from remote_vae import RemoteVAE

ENVIRONMENT = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE_MIB * 2**20)}
SETTLE_S = 20.0
LOOK_S = 5.0
BAD = (Outcome.LOST, Outcome.WRONG, Outcome.HUNG)


def models() -> list[dict[str, Any]]:
    """Two whose engine waits, with two replicas each: one behind the ingress, one at a path of its own; and the bundled one, in
    float32, as which it is compared."""
    replicas = {"deployments": [{"name": "VAE", "num_replicas": 2}]}
    waiting = [
        fake_model(name, DOORS[name] == "direct", {"decode_s": FAKE_DECODE_S}) | replicas for name in (FAKE, DIRECT)
    ]
    exact = {"source": "demo", "dtype": "float32", "num_cpus": 0}
    return [*waiting, {"name": REAL, "route_prefix": None, "import_path": "remote_vae_serve.app:vae", "args": exact}]


def main() -> int:
    args = _arguments()
    known = faults(args.haproxy)
    chosen = [(name, known[name]) for name in args.only or known]
    answers: list[Answer] = []
    happened: list[Fault] = []
    over = threading.Event()
    with serve(models(), args.haproxy, environment=ENVIRONMENT) as server:
        todo = works()
        vaes = {name: RemoteVAE(f"{server.url}/{name}", deadline=DEADLINE_S, timeout=(5.0, TRY_S)) for name in DOORS}
        for work in todo:  # the server is right before anything is broken
            outcome, why = plain(server.url, work)
            assert outcome is Outcome.RIGHT, (work.name, why)
        seconds = args.minutes * 60
        before = holdings(server.processes())
        watch = Watch(len(chosen) * args.every)
        clients = []
        for door in sorted(set(DOORS.values())):
            there = [work for work in todo if DOORS[work.model] == door]
            clients += [
                Clients("ours", [lambda work: ours(vaes[work.model], work)] * args.clients, there, answers.append),
                Clients("plain", [partial(plain, server.url)] * args.clients, there, answers.append),
            ]
        with _generators(server, args.clients, seconds) as generators:
            said: list[str] = []
            listening = threading.Thread(target=lambda: said.extend(generators.stdout or ()))
            listening.start()
            watching = threading.Thread(target=_look, args=(watch, server, over))
            watching.start()
            _break(server, chosen, seconds, args.every, happened)
            listening.join(DEADLINE_S + SETTLE_S)
            failed = _code(generators) != 0
            generators.kill()
        answers += [Answer.from_json(line) for line in said if line.startswith("{")]
        hung = sum(group.stop() for group in clients)
        over.set()
        watching.join()
        left = _left_behind(server)
        after = holdings(server.processes())
    growths = watch.growths()
    lines = [
        "# Soak", "",
        f"{args.minutes:g} minutes, a fault every {args.every:g} s, "
        f"{'HAProxy' if args.haproxy else 'Python proxy'}; "
        f"commit {_commit()}, {datetime.now(timezone.utc):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}.", "",
        *report.outcomes_table(answers), "", *report.silences_table(answers, happened), "",
        *report.holdings_table(before, after), "",
        f"Processes that were started meanwhile: {watch.started(before)}.", "", *report.growth_table(growths), "",
        f"Left behind: {left}.", "",
        *report.what_went_wrong(answers),
    ]  # fmt: skip
    worse = report.beyond(answers, happened)
    lines += worse
    if failed:
        lines.append("- the generators ended before their time")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    if args.answers:
        args.answers.write_text("".join(f"{answer.to_json()}\n" for answer in answers))
    is_lost = any(answer.outcome in BAD and not _is_allowed(answer) for answer in answers) or failed or hung > 0
    is_kept = any(growth.is_leak for growth in growths) or any(left.values())
    return int(is_lost or is_kept or (args.strict and bool(worse)))


def _is_allowed(answer: Answer) -> bool:
    """Who tries nothing again loses what was in flight where a process died."""
    return (answer.client, answer.outcome) == ("plain", Outcome.LOST)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two faults")
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--strict", action="store_true", help="judge silences and a plain client's losses as well")
    parser.add_argument(
        "--only", action="append", help="this fault, again and again; may be repeated, for a cycle of several"
    )
    parser.add_argument("--clients", type=int, default=2, help="of each kind, at each door")
    parser.add_argument("--out", type=Path, help="also write the report there")
    parser.add_argument("--answers", type=Path, help="write every request's end there, as lines of JSON")
    return parser.parse_args()


def _look(watch: Watch, server: LocalServer, over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        watch.look(server.processes())


def _break(
    server: LocalServer,
    chosen: Sequence[tuple[str, Callable[[LocalServer], bool]]],
    seconds: float,
    every_s: float,
    happened: list[Fault],
) -> None:
    """One fault after the other, the last early enough to get over."""
    until = time.monotonic() + seconds
    for name, fault in itertools.cycle(chosen):
        began = time.monotonic()
        if began + every_s > until:
            time.sleep(max(until - began, 0))
            return
        at = time.time()
        hit = fault(server)
        happened.append(Fault(name, at, hit))
        print(f"{datetime.now():%H:%M:%S} {name}{'' if hit else ': nothing to break'}", flush=True)
        time.sleep(max(began + every_s - time.monotonic(), 0))


def _generators(server: LocalServer, actors: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.soak.handles", str(actors), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, env=joining(server), stdout=subprocess.PIPE, text=True)


def _code(process: subprocess.Popen[str]) -> int | None:
    """Its exit code; None where it does not end."""
    try:
        return process.wait(SETTLE_S)  # its last line is out before it has ended
    except subprocess.TimeoutExpired:
        return None


def _left_behind(server: LocalServer) -> Mapping[str, int]:
    command = [sys.executable, "-m", "benchmarks.soak.left_behind", str(SETTLE_S)]
    told = subprocess.run(command, cwd=ROOT, env=joining(server), check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(told.stdout.splitlines()[-1]))


def _commit() -> str:
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
