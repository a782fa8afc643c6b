"""What a request costs: processor time of each process, of one small and one large request, at a model's own path and through the
ingress."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.contenders import Ours
from benchmarks.findings import Figure, Finding, figure
from benchmarks.load import Load
from benchmarks.turns import Request, Settings

KINDS: Mapping[str, str] = {
    "ray::ServeReplica:bare": "an empty application's replica",
    "ray::ServeReplica:remote-vae": "ingress",
    "ray::ServeReplica": "replica",
    "ray::ProxyActor": "Serve's proxy",
    "ray::HAProxyManager": "HAProxy's manager",
    "ray::ServeController": "Serve's controller",
    "haproxy": "HAProxy",
    "raylet": "Ray",
    "gcs_server": "Ray",
}
"""What is in a process's command, the first that is, and what the table calls it."""
REST = "the rest"
TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")
WARM_UP = 20


def costs(ours: Ours, ways: Mapping[str, tuple[str, Request]], settings: Settings, number: str) -> Finding:
    """Of each way, a URL and what is asked there: who spent how long on one request, one client sending one after the other."""
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(settings.repetitions):
            for way, (url, request) in ways.items():
                body = request.written(Path(folder))
                headers = {"content-type": "tensor/binary"}
                Load(f"{url}?{request.query}", body, count=WARM_UP, seconds=60, headers=headers).run()
                before = _spent(ours.processes())
                answers = Load(f"{url}?{request.query}", body, seconds=2 * settings.seconds, headers=headers).run()
                spent = _spent(ours.processes())
                times = len(answers.latencies_ms)
                found.setdefault((way, "client"), []).append(1000 * answers.client_s / times)
                for kind in spent.keys() | before.keys():
                    found.setdefault((way, kind), []).append((spent[kind] - before[kind]) / times)
    figures = [
        figure(way, f"processor time of {kind}", "ms", values)
        for way in ways
        for kind, values in sorted(_of(found, way), key=lambda one: -sum(one[1]))
        if len(values) == settings.repetitions and max(values) >= 0.005
    ]
    return Finding(number, "What a request costs: processor time of each process", tuple(figures + _sums(figures)), ())


def _of(found: Mapping[tuple[str, str], list[float]], way: str) -> list[tuple[str, list[float]]]:
    """The kinds of processes of one way, with what each spent."""
    return [(kind, values) for (whose, kind), values in found.items() if whose == way]


def _sums(figures: list[Figure]) -> list[Figure]:
    ways = dict.fromkeys(one.who for one in figures)
    return [
        figure(way, "processor time of all, the client left out", "ms",
               [sum(each) for each in zip(*(one.values for one in figures
                                            if one.who == way and not one.what.endswith("client")), strict=True)])
        for way in ways
    ]  # fmt: skip


def _spent(processes: list[int]) -> Counter[str]:
    """Milliseconds of processor time so far, by kind of process."""
    spent = Counter[str]()
    for pid in processes:
        with contextlib.suppress(OSError):  # ended meanwhile
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            kind = next((name for word, name in KINDS.items() if word in command), REST)
            spent[kind] += (int(fields[11]) + int(fields[12])) * TICK_MS
    return spent
