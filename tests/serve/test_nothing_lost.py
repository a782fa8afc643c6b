"""The short forms of `make soak` and `make soak-nodes`: while parts of a running server are killed, nothing is lost, wrong or
left behind. Their exit codes say what their reports do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from haproxy_binary import why_no_haproxy

ROOT = Path(__file__).parents[2]
FAULTS = ("replica killed", "ingress killed", "proxy killed", "update")
HAPROXY_FAULTS = (
    "replica killed", "ingress killed", "HAProxy killed", "HAProxy's manager killed", "controller killed", "update",
)  # fmt: skip
EVERY_S = 10
LAST_S = 600.0


def test_our_client_and_handles_lose_nothing_at_either_door_while_parts_are_killed() -> None:
    """Each fault once, under clients of three kinds."""
    _soak(FAULTS)


@pytest.mark.slow
def test_nor_under_haproxy() -> None:
    if (reason := why_no_haproxy()) is not None:
        pytest.skip(reason)
    _soak(HAPROXY_FAULTS, "--haproxy")


@pytest.mark.slow
def test_nor_does_a_plain_client_while_a_model_falls_asleep_and_wakes_at_one_url() -> None:
    if (reason := why_no_haproxy()) is not None:
        pytest.skip(reason)
    assert "| GET right |" in _run("asleep", "--changes", "6")


@pytest.mark.slow
def test_nor_while_a_node_is_lost_and_a_plain_client_neither_while_one_is_drained() -> None:
    told = _run("nodes", "--times", "1", "--faults", "lost,drained")
    assert "| lost | 1 |" in told
    assert "| drained | 1 |" in told


def _soak(faults: tuple[str, ...], *options: str) -> None:
    chosen = [word for fault in faults for word in ("--only", fault)]
    minutes = EVERY_S * (len(faults) + 1) / 60
    told = _run("soak", "--minutes", f"{minutes:g}", "--every", str(EVERY_S), "--clients", "1", *chosen, *options)
    for fault in faults:
        assert f"\n| {fault} | 1 |" in told, told


def _run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LAST_S, check=False)
    assert told.returncode == 0, f"{told.stdout}\n{told.stderr[-4000:]}"
    return told.stdout
