"""A real browser plays our mp4 from the first frame to the last, while it is being served."""

from __future__ import annotations

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from reading import frames
from remote_vae_serve.codecs.mp4 import to_mp4

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PAGE = b"""<video id=v muted autoplay src="/video.mp4"></video><script>
const v = document.getElementById("v");
v.onerror = () => fetch("/said?error=" + encodeURIComponent(v.error.message));
v.onended = () => fetch(`/said?width=${v.videoWidth}&height=${v.videoHeight}&seconds=${v.duration}`
    + `&frames=${v.getVideoPlaybackQuality().totalVideoFrames}`);
</script>"""


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_plays_it_to_the_end(tmp_path: Path) -> None:
    mp4 = to_mp4([frames(12, 48, 64)], (12, 48, 64, 3), 8)
    said: dict[str, list[str]] = {}
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/said":
                said.update(parse_qs(url.query))
                done.set()
            content, kind = (mp4, "video/mp4") if url.path == "/video.mp4" else (PAGE, "text/html")
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}",
             "--autoplay-policy=no-user-gesture-required"]  # fmt: skip
    browser = subprocess.Popen(
        [str(BROWSER), *flags, "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert done.wait(40), "the browser said nothing"
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
        server.server_close()
    assert {name: values[0] for name, values in said.items()} == {
        "width": "64", "height": "48", "seconds": "1.5", "frames": "12",
    }  # fmt: skip
