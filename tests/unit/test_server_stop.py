"""The end of the server that the launcher runs: requests in flight finish, unless a second signal says not to wait."""

from __future__ import annotations

import os
import signal
import time

import pytest

from limits import WAIT_S
from remote_vae_serve.launcher import server


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the end was made of, in turn."""
    done: list[str] = []
    monkeypatch.setattr("ray.serve.shutdown", lambda: done.append("shutdown"))
    monkeypatch.setattr(server, "drain", lambda limit_s: done.append(f"drain {limit_s:g}"))
    return done


def test_serve_goes_when_requests_have_finished(stopped: list[str]) -> None:
    server._stop(30)
    assert stopped == ["drain 30", "shutdown"]


def test_without_a_limit_or_before_anything_is_deployed_nothing_is_waited_for(stopped: list[str]) -> None:
    server._stop(0)
    assert stopped == ["shutdown"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(
    stopped: list[str], number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def drain(limit_s: float) -> None:
        os.kill(os.getpid(), number)
        time.sleep(WAIT_S)

    monkeypatch.setattr(server, "drain", drain)
    before = signal.getsignal(number)
    began = time.monotonic()
    server._stop(WAIT_S)
    assert time.monotonic() - began < WAIT_S / 2
    assert stopped == ["shutdown"]
    assert "Stopping at once" in capsys.readouterr().out
    assert signal.getsignal(number) is before


def test_what_has_not_finished_in_time_is_said(
    stopped: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "drain", lambda limit_s: ["sd-v1"])
    server._stop(5)
    assert "After 5 s there were still requests for sd-v1" in capsys.readouterr().out
