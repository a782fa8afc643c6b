"""The server that tests and the demo start: one whose Ray was late is started anew, any other that ends is reported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from local_server import RAY_WAS_LATE, LocalServer, ServerFailed

COUNTS_ITS_STARTS = """
import http.server, pathlib, sys, yaml
starts, late, config = pathlib.Path(sys.argv[1]), sys.argv[2], yaml.safe_load(open(sys.argv[3]))
starts.write_text(starts.read_text() + "x")
if len(starts.read_text()) < 3:
    sys.exit(late)
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"models": [{"name": "demo", "state": "ready"}]}')
http.server.HTTPServer(("127.0.0.1", config["http_options"]["port"]), Models).serve_forever()
"""


def starting(starts: Path, last_words: str) -> LocalServer:
    """One that ends twice with these words, and then serves."""
    starts.write_text("")
    return LocalServer(command=(sys.executable, "-c", COUNTS_ITS_STARTS, str(starts), last_words))


def test_a_server_whose_ray_was_late_is_started_anew(tmp_path: Path) -> None:
    with starting(tmp_path / "starts", f"The current {RAY_WAS_LATE}.") as server:
        assert server.processes()
    assert (tmp_path / "starts").read_text() == "xxx"


def test_one_that_ends_otherwise_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="no such file"):
        starting(tmp_path / "starts", "no such file").start()
    assert (tmp_path / "starts").read_text() == "x"
