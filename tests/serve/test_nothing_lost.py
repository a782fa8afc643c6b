"""The short form of `make soak`: while parts of a running server are killed, nothing is lost, wrong or left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = ("replica killed", "ingress killed", "proxy killed", "update")
EVERY_S = 10
LAST_S = 600.0


def test_our_client_and_handles_lose_nothing_at_either_door_while_parts_are_killed() -> None:
    """Each fault once, under clients of three kinds. The exit code says what the report does."""
    chosen = [word for fault in FAULTS for word in ("--only", fault)]
    minutes = EVERY_S * (len(FAULTS) + 1) / 60
    command = [sys.executable, *f"-m benchmarks.soak --minutes {minutes:g} --every {EVERY_S} --clients 1".split()]
    told = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, timeout=LAST_S, check=False)
    assert told.returncode == 0, f"{told.stdout}\n{told.stderr[-4000:]}"
    for fault in FAULTS:
        assert f"\n| {fault} | 1 |" in told.stdout, told.stdout
