"""A real browser that opens a page of ours, and hears what the page says."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--autoplay-policy=no-user-gesture-required",
         "--remote-debugging-port=0")  # fmt: skip
SAYS_S = 40


class Site:
    """A web site on 127.0.0.1, for a `with`: `files` are its contents and their types by path. Pages POST to /said."""

    def __init__(self, files: Mapping[str, tuple[bytes, str]]) -> None:
        self.files = dict(files)
        self._said = b""
        self._done = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.origin = f"http://127.0.0.1:{self._server.server_port}"

    def opened(self, profile: Path) -> bytes:
        """What the page at / says, opened in a browser with that empty folder for its own."""
        browser = subprocess.Popen(
            [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", f"{self.origin}/"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with ExitStack() as at_the_end:
            at_the_end.callback(browser.wait)
            at_the_end.callback(browser.terminate)
            assert self._done.wait(SAYS_S), "the browser said nothing"
        return self._said

    def __enter__(self) -> Site:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(*site.files.get(self.path, (b"", "text/plain")))

            def do_POST(self) -> None:
                site._said = self.rfile.read(int(self.headers["content-length"]))
                site._done.set()
                self._answer(b"", "text/plain")

            def _answer(self, content: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        return Handler
