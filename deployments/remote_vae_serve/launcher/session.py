"""`Session`: a server in a Unix session of its own, so that a signal to the launcher's process group reaches it alone.

Ctrl-C sends SIGINT to a whole group, many supervisors SIGTERM: Ray's processes would end in the middle of what they do, before
the server that drains them has begun, and leave others behind. What the server leaves of its session ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LEAVE_S = 5.0
PR_SET_PDEATHSIG = 1


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command in a session of its own until it ends, and hand on the signals that come; one that is ignored, as SIGHUP is
    under nohup, stays so. Processes of its session that outlive it get SIGTERM, and SIGKILL `LEAVE_S` seconds later.

    Returns:
        Its exit code; 128 and the signal's number where one has ended it, as shells have it.
    """
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True)

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, hand_on)
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code
    finally:
        _end(process.pid)


def end_with_parent() -> None:
    """Have this process get SIGTERM when its parent dies, however that dies. Linux only; elsewhere it goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(session: int) -> None:
    """End what is left of a session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _members(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        give_up = time.monotonic() + LEAVE_S
        while any(_members(session)) and time.monotonic() < give_up:
            time.sleep(0.05)


def _members(session: int) -> Iterator[int]:
    """The live processes of a session. Ray's are children of this process no more: whose parent dies goes to init."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            state, _, _, its = path.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                yield int(path.name)
