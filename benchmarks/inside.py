"""The works that look at more than an answer's time: a handle call, memory, and small requests beside a long one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import ROOT, Ours
from benchmarks.findings import Finding, Goal, figure
from benchmarks.handles import PLAIN
from benchmarks.load import Answers, Load
from benchmarks.turns import Request, Settings
from benchmarks.works import DIRECT, INGRESS, Run, Work, fake

HUGE = (11824, 11824)  # times three: 400 MiB
LARGE = (1, 4, 3620, 3620)  # of float32: 200 MiB
UINT8 = {"output_type": "pt", "partial_postprocess": "True"}
SHORT, LONG = (1, 4, 16, 16), (1, 4, 358, 358)
S_PER_MEGAPIXEL = 0.02 * 2**20 / (8 * 16) ** 2  # SHORT takes 20 ms, LONG 10 s
MIXED_S = 10.0
SERVES_PROXY = "Serve's own proxy puts no brake on a replica, and pickles what it fetches; such replies are HAProxy's."


def handle_call(ours: Ours, settings: Settings) -> Finding:
    command = [
        sys.executable,
        "-m",
        "benchmarks.handles",
        ours.server.ray_address,
        "wide",
        "15",
        str(settings.repetitions),
    ]
    environment = os.environ | ours.server.ray_environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"the caller failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    mine = figure("ours, AsyncRemoteVAE of a torch tensor", "p50", "ms", found["ours"])
    plain = figure("plain Serve call of a numpy array", "p50", "ms", found["plain"])
    read = figure("plain Serve call that reads its array once", "p50", "ms", found["read"])
    mine_small = figure("ours, small latents", "p50", "ms", found["ours small"])
    plain_small = figure("plain Serve gRPC call of as many bytes", "p50", "ms", found["plain small"])
    by_reference = figure("the same by reference", "p50", "ms", found["plain small by reference"])
    goals = (
        Goal.of("p50 of small latents, of a plain gRPC call's", mine_small, plain_small, 1.5),
        Goal.of("p50, of the plain call's", mine, plain, 1.5),
        Goal.of("p50, of a plain call's that reads its array", mine, read, 1.5),
    )
    figures = (mine, plain, read, mine_small, plain_small, by_reference)
    return Finding("7", "50 MiB of latents, and small ones, through a handle, from an actor", figures, goals)


def large_reply(number: str, how: str) -> Run:
    def run(ours: Ours, settings: Settings) -> Finding:
        payload = HUGE[0] * HUGE[1] * 3
        grown, walls, most = _grown(ours, "huge", Request((1, 4, 8, 8), UINT8), settings)
        # The engine has the pixels at rest already; a real one would have to make them.
        ratios = [(one + payload) / payload for one in grown]
        note = f"Grown most in the last one, beside the engine's own {payload / 2**20:.0f} MiB: {most}."
        is_flat = how == "HAProxy"
        title = f"One reply of 400 MiB, direct door, {how}: memory"
        return _memory(number, title, ratios, walls, (note,) if is_flat else (note, SERVES_PROXY), is_flat)

    return run


def large_request(ours: Ours, settings: Settings) -> Finding:
    payload = 4 * math.prod(LARGE)
    grown, walls, most = _grown(ours, "wide", Request(LARGE, UINT8), settings)
    ratios = [one / payload for one in grown]
    title = "One request of 200 MiB, direct door, HAProxy: memory"
    return _memory("8c", title, ratios, walls, (f"Grown most in the last one: {most}.",), True)


def _memory(
    number: str, title: str, ratios: Sequence[float], walls: Sequence[float], notes: tuple[str, ...], is_flat: bool
) -> Finding:
    figures = (figure(DIRECT, "peak over payload", "x", ratios), figure(DIRECT, "whole answer", "s", walls))
    goal = Goal("peak of all processes over their rest, of the payload", tuple(ratios), 1.5)
    return Finding(number, title, figures, (goal,) if is_flat else (), notes)


def _grown(ours: Ours, model: str, request: Request, settings: Settings) -> tuple[list[float], list[float], str]:
    """Of each repetition the bytes by which all processes grew over their rest at its peak, and seconds to the whole answer; and
    which grew most."""
    grown, walls, who = [], [], {}
    # Once, before the first request: what a process keeps of one reply is no part of its rest when the next one comes.
    rest = {pid: _status(pid, "VmRSS") for pid in ours.processes()}
    with tempfile.TemporaryDirectory() as folder:
        load = Load(
            f"{ours.direct(model)}?{request.query}", request.written(Path(folder)), count=1, warm_up=0, seconds=60
        )
        for _ in range(settings.repetitions):
            for pid in rest:
                _reset_peak(pid)
            answers = load.run()
            who = {pid: _status(pid, "VmHWM") - size for pid, size in rest.items()}
            grown.append(float(sum(who.values())))
            walls.append(answers.p50 / 1000)
        most = sorted(who.items(), key=lambda item: -item[1])[:3]
        return grown, walls, ", ".join(f"{_name(pid)} {size / 2**20:.0f} MiB" for pid, size in most)


def mixed(ours: Ours, settings: Settings) -> Finding:
    """One job of 10 s, and 20 jobs of 20 ms a second."""
    doors = {INGRESS: ours.ingress("mixed"), DIRECT: ours.direct("mixed")}
    found: dict[tuple[str, str], list[Answers]] = {}
    with tempfile.TemporaryDirectory() as folder:
        small, big = (Request(shape, UINT8) for shape in (SHORT, LONG))
        small_body, big_body = small.written(Path(folder)), big.written(Path(folder))
        for _ in range(settings.repetitions):
            for door, url in doors.items():
                many = Load(f"{url}?{small.query}", small_body, 32, MIXED_S, rate=20, warm_up=0)
                found.setdefault((door, "alone"), []).append(many.run())
                long = Load(f"{url}?{big.query}", big_body, count=1, warm_up=0, seconds=60).start()
                found.setdefault((door, "beside"), []).append(many.run())
                found.setdefault((door, "long"), []).append(long.wait())
                _check_together(found[door, "beside"][-1], found[door, "long"][-1])
    figures, goals, notes = [], [], []
    for door in doors:
        alone, beside = (
            figure(door, f"p95, {what}", "ms", [one.p95 if one.latencies_ms else 1e6 for one in found[door, key]])
            for what, key in (("20 ms jobs alone", "alone"), ("20 ms jobs beside one of 10 s", "beside"))
        )
        longs = figure(
            door, "the 10 s job", "s", [max(one.latencies_ms, default=0) / 1000 for one in found[door, "long"]]
        )
        figures += [alone, beside, longs]
        limit, way = (2, "at the model's own path") if door == DIRECT else (3, "through the ingress")
        goals.append(Goal.of(f"p95 of short jobs {way} beside a long one, of p95 alone", beside, alone, limit))
        p50 = sum(one.p50 for one in found[door, "beside"]) / settings.repetitions
        late = [sum(ms > 1000 for ms in one.latencies_ms) / len(one.latencies_ms) for one in found[door, "beside"]]
        failed = sum(one.failed for (who, _), answers in found.items() if who == door for one in answers)
        notes.append(f"{door}: beside the long job p50 {p50:.0f} ms, {sum(late) / len(late):.0%} take more than a second; "
                     f"{failed} of all requests failed.")  # fmt: skip
    title = "Mixed load, two replicas: one job of 10 s, and 20 jobs of 20 ms a second"
    return Finding("9", title, tuple(figures), tuple(goals), tuple(notes))


def _check_together(many: Answers, long: Answers) -> None:
    """Raises RuntimeError where the long job was not there: a warm-up that waited behind it made it so, and all looked well."""
    together = min(many.began + MIXED_S, long.began + long.wall_s) - max(many.began, long.began)
    if together < 0.9 * MIXED_S:
        raise RuntimeError(f"the short jobs ran beside the long one for {together:.1f} s only, of {MIXED_S:g}")


def _reset_peak(pid: int) -> None:
    with contextlib.suppress(OSError):  # ended meanwhile
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int, field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0  # ended meanwhile


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return Path(words[0]).name


INSIDE: tuple[Work, ...] = (
    Work("7", True, {"wide": fake((64, 64))}, handle_call, (PLAIN,)),
    Work("8a", True, {"huge": fake(HUGE)}, large_reply("8a", "HAProxy")),
    Work("8c", True, {"wide": fake((64, 64))}, large_request),
    Work("9", True, {"mixed": fake((64, 64), seconds_per_megapixel=S_PER_MEGAPIXEL) | {"replicas": 2}}, mixed),
    Work("8b", False, {"huge": fake(HUGE)}, large_reply("8b", "no flag")),
)


def real_args(folder: str) -> dict[str, Any]:
    return {"source": folder, "threads": 1}
