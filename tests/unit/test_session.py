"""A server in a session of its own: signals are handed on, to it alone; it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limits import WAIT_S
from local_server import living

SERVER = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
told = []

def stop(number, frame):
    told.append(signal.Signals(number).name)
    (folder / "told").write_text(" ".join(told))
    if len(told) == 2:
        sys.exit(7)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
left = subprocess.Popen([sys.executable, "-c", deaf])
(folder / "pids.part").write_text(f"{os.getpid()} {left.pid}")
(folder / "pids.part").rename(folder / "pids")
while True:
    time.sleep(1)
"""
LAUNCHER = """
import os, signal, sys
from remote_vae_serve.launcher import session
session.LEAVE_S = 0.5
for number in sys.argv.pop(1).split():
    signal.signal(int(number), signal.SIG_DFL)
sys.exit(session.run([sys.executable, *sys.argv[1:]], os.environ))
"""


class Launcher:
    """A launcher in a process group of its own, whose server writes down what it is told. It ignores no signal that these tests
    ignore, who may run in the background themselves; under nohup it is left its own way with SIGHUP."""

    def __init__(self, folder: Path, server: str = SERVER, before: tuple[str, ...] = ()) -> None:
        self._folder = folder
        (folder / "server.py").write_text(server)
        heard = f"{signal.SIGINT:d}" if before else f"{signal.SIGINT:d} {signal.SIGHUP:d}"
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", LAUNCHER, heard, str(folder / "server.py"), str(folder)], process_group=0
        )
        self.pids = [int(pid) for pid in self._read("pids").split()]

    def _read(self, name: str, words: int = 1) -> str:
        give_up = time.monotonic() + WAIT_S
        while not (path := self._folder / name).exists() or len(path.read_text().split()) < words:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        return path.read_text()

    def told(self, times: int) -> str:
        return self._read("told", times)


def test_a_signal_to_the_whole_group_reaches_the_server_once_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    os.killpg(launcher.process.pid, signal.SIGTERM)
    assert launcher.told(1) == "SIGTERM"
    assert living(launcher.pids) == launcher.pids  # it drains
    os.killpg(launcher.process.pid, signal.SIGINT)
    assert launcher.process.wait(WAIT_S) == 7
    assert launcher.told(2) == "SIGTERM SIGINT"
    assert not living(launcher.pids), "one that ignores SIGTERM is left"


def test_a_terminal_that_is_closed_is_a_sigterm(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    launcher.process.send_signal(signal.SIGHUP)
    assert launcher.told(1) == "SIGTERM"
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.process.wait(WAIT_S) == 7


def test_under_nohup_a_terminal_that_is_closed_is_nothing(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, before=("nohup",))
    launcher.process.send_signal(signal.SIGHUP)
    launcher.process.send_signal(signal.SIGTERM)
    launcher.told(1)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.told(2) == "SIGTERM SIGTERM"
    assert launcher.process.wait(WAIT_S) == 7


def test_a_server_that_is_killed_ends_the_launcher_with_the_signals_number(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    os.kill(launcher.pids[0], signal.SIGKILL)
    assert launcher.process.wait(WAIT_S) == 128 + signal.SIGKILL
    assert not living(launcher.pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_launcher_that_is_killed_takes_its_server_along(tmp_path: Path) -> None:
    launcher = Launcher(
        tmp_path, "from remote_vae_serve.launcher.session import end_with_parent\nend_with_parent()\n" + SERVER
    )
    launcher.process.kill()
    launcher.process.wait(WAIT_S)
    assert launcher.told(1) == "SIGTERM"
    for pid in launcher.pids:
        os.kill(pid, signal.SIGKILL)
