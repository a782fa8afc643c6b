"""A Hub of one's own: the few routes that finding and downloading a model uses, on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `folders[repo]`; `refusals[repo]` is (status, X-Error-Code). `url` goes into HF_ENDPOINT."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        self.url = ""

    def files(self, repo: str) -> list[str]:
        folder = self.folders[repo]
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} {path}")
            if path.startswith("api/models/"):
                self._api(path.removeprefix("api/models/"))
            else:
                repo, _, rest = path.partition("/resolve/")
                revision, _, name = rest.partition("/")
                self._file(repo, revision, name)

        def _api(self, path: str) -> None:
            repo = "/".join(path.split("/")[:2])
            rest = path.split("/")[2:]
            revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
            if self._refused(repo, revision):
                return None
            if rest[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": (hub.folders[repo] / name).stat().st_size}
                    for name in hub.files(repo)
                ]
                return self._json(tree)
            siblings = [{"rfilename": name} for name in hub.files(repo)]
            return self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

        def _file(self, repo: str, revision: str, name: str) -> None:
            if self._refused(repo, revision):
                return None
            path = hub.folders[repo] / name
            if not path.is_file():
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def _refused(self, repo: str, revision: str) -> bool:
            status, code = hub.refusals.get(repo, (0, ""))
            if not status and repo not in hub.folders:
                status, code = 404, "RepoNotFound"
            if not status and revision not in ("main", COMMIT):
                status, code = 404, "RevisionNotFound"
            if status:
                self._answer(status, b"{}", {"X-Error-Code": code})
            return bool(status)

        def _json(self, content: object) -> None:
            self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for header, value in headers.items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
