"""`remote-vae-haproxy`, started as Serve starts it, with a program in HAProxy's place that says how it was started."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remote_vae.ray_internals import HAPROXY_BINARY_VARIABLE
from remote_vae_serve.haproxy import command

SERVES = "global\n    maxconn 10\nfrontend prometheus\n    bind :9101\nlisten stats\n  bind *:8404\n"
SAYS = f"""#!{sys.executable} -IS
import json, os, signal, sys
if "-c" in sys.argv:
    sys.exit(int(os.environ["REFUSES"]))
print(json.dumps({{"pid": os.getpid(), "arguments": sys.argv[1:], "names": sorted(os.environ)}}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "haproxy").write_text(SAYS)
    (tmp_path / "haproxy").chmod(0o755)
    (tmp_path / "haproxy.cfg").write_text(SERVES)
    return tmp_path


def started(folder: Path, *more: str, **environment: str) -> tuple[dict[str, Any], str, int]:
    """What HAProxy says of its start, what was said on stderr, and the pid that was started."""
    arguments = ["-db", "-f", str(folder / "haproxy.cfg"), *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "remote_vae_serve.haproxy.command", *arguments],
        env=os.environ | {command.BINARY: str(folder / "haproxy"), "REFUSES": "0"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out), err, process.pid


def test_it_becomes_haproxy_with_serves_arguments_and_a_file_of_ours(folder: Path) -> None:
    said, _, pid = started(folder, "-dR", "-sf", "12")
    ours, serves = folder / "haproxy.remote-vae.cfg", folder / "haproxy.cfg"
    # Serve's own stays among them: Serve tells by it which processes are its HAProxies.
    assert said["arguments"] == ["-db", "-f", str(ours), "-dR", "-sf", "12", "-L", str(serves)]
    assert said["pid"] == pid
    assert HAPROXY_BINARY_VARIABLE not in said["names"]


def test_the_file_is_its_owners_alone_and_serves_own_stays(folder: Path) -> None:
    for _ in range(2):  # the second time over the first
        started(folder, REMOTE_VAE_TOKENS="s3cret")
        ours = folder / "haproxy.remote-vae.cfg"
        assert stat.S_IMODE(ours.stat().st_mode) == 0o600
        assert "bind 127.0.0.1:9101" in ours.read_text()
        assert "s3cret" not in ours.read_text()
    assert (folder / "haproxy.cfg").read_text() == SERVES
    assert sorted(path.name for path in folder.iterdir()) == ["haproxy", "haproxy.cfg", "haproxy.remote-vae.cfg"]


def test_edits_without_a_place_are_said_once(folder: Path) -> None:
    _, err, _ = started(folder)
    (line,) = err.splitlines()
    assert line.endswith("left out: JSON for HAProxy's own errors, and who asked, JSON where no application is")


def test_metrics_are_told_where_the_environment_says(folder: Path) -> None:
    started(folder, **{command.METRICS_HOST: "0.0.0.0"})
    assert "bind 0.0.0.0:9101" in (folder / "haproxy.remote-vae.cfg").read_text()
    _, err, _ = started(folder, **{command.METRICS_HOST: "x\n  bind y"})
    assert "bind 127.0.0.1:9101" in (folder / "haproxy.remote-vae.cfg").read_text()
    assert f"{command.METRICS_HOST} is " in err


def test_haproxy_starts_with_serves_file_where_it_does_not_take_ours(folder: Path) -> None:
    said, err, _ = started(folder, REFUSES="1")
    assert said["arguments"] == ["-db", "-f", str(folder / "haproxy.cfg")]
    assert "stays as Serve has written it: HAProxy does not take" in err


def test_haproxy_starts_with_serves_file_where_ours_cannot_be_written(folder: Path) -> None:
    (folder / "haproxy.remote-vae.cfg").mkdir()
    said, err, _ = started(folder)
    assert said["arguments"] == ["-db", "-f", str(folder / "haproxy.cfg")]
    assert "stays as Serve has written it: " in err


def test_what_python_ignores_haproxy_does_not(folder: Path) -> None:
    (folder / "haproxy").write_text(
        '#!/bin/sh\n[ "$1" = -c ] || printf \'"%s"\' "$(grep SigIgn /proc/$$/status | cut -f2)"\n'
    )
    said, _, _ = started(folder)
    ignored = {number for number in signal.valid_signals() if int(str(said), 16) >> (number - 1) & 1}
    assert not ignored & {signal.SIGPIPE, signal.SIGXFSZ}  # others may be: under nohup, in the background of a script


def test_it_imports_nothing_that_is_slow() -> None:
    code = "import sys, remote_vae_serve.haproxy.command; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {name.partition(".")[0] for name in run.stdout.split()}
    assert not {"ray", "torch", "numpy", "PIL", "requests", "starlette", "pydantic", "yaml", "click"} & found


def test_serve_is_told_of_it_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert command.variables({}) is None
    script = tmp_path / command.NAME
    script.touch(0o755)
    assert command.variables({}) == {HAPROXY_BINARY_VARIABLE: str(script)}
    assert command.variables({HAPROXY_BINARY_VARIABLE: str(script)}) == {HAPROXY_BINARY_VARIABLE: str(script)}
    chosen = {HAPROXY_BINARY_VARIABLE: "/opt/haproxy"}
    assert command.variables(chosen) == {HAPROXY_BINARY_VARIABLE: str(script), command.BINARY: "/opt/haproxy"}
