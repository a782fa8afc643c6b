"""`make demo` does what it says, and leaves nothing running whatever happens to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from PIL import Image

from limits import WAIT_S

pytestmark = pytest.mark.slow  # whole demos, each with a server of its own
DEMO = Path(__file__).parents[2] / "tools" / "demo.py"


def start(out: Path, mark: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DEMO), "--out", str(out)],
        env=os.environ | {"REMOTE_VAE_TEST_MARK": mark} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def marked(mark: str) -> list[str]:
    """The processes that inherited the mark: whatever a demo started, however deep."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environment.read_bytes():
                found.append((environment.parent / "comm").read_text().strip())
        except OSError:
            continue
    return found


def test_it_writes_the_pictures_and_the_clip_and_stops_what_it_started(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    demo = start(tmp_path, mark)
    output, _ = demo.communicate(timeout=5 * WAIT_S)
    assert demo.returncode == 0, output
    assert "the same pixels" in output
    assert float(output.split("PSNR of the decoded picture ")[1].split(" dB")[0]) > 24
    for name in ("original.png", "decoded-http.png", "decoded-handle.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (448, 288)
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    assert not marked(mark)


@pytest.mark.parametrize(("stop", "after"), [(signal.SIGINT, "serve"), (signal.SIGTERM, "raylet")])
def test_stopped_in_the_middle_it_leaves_nothing_running(tmp_path: Path, stop: signal.Signals, after: str) -> None:
    """Once when its server is being started, once when Ray runs already."""
    mark = uuid.uuid4().hex
    demo = start(tmp_path, mark)
    give_up = time.monotonic() + WAIT_S
    while not (len(marked(mark)) > 1 if after == "serve" else after in marked(mark)):
        assert time.monotonic() < give_up, marked(mark)
        time.sleep(0.1)
    time.sleep(1)
    demo.send_signal(stop)
    output, _ = demo.communicate(timeout=5 * WAIT_S)
    assert demo.returncode == 130, output
    assert not marked(mark)


def test_a_failure_says_so_and_leaves_nothing_running(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("in the way")
    demo = start(tmp_path / "out", mark, RAY_TMPDIR=str(not_a_folder))
    output, _ = demo.communicate(timeout=5 * WAIT_S)
    assert demo.returncode not in (0, 130), output
    assert not marked(mark)
