"""A real HTTP server on 127.0.0.1 that says whatever a test wants it to say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.result import Result


class Exchange(BaseHTTPRequestHandler):
    """One connection. `said` is the request's body; the methods answer it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    said: bytes

    def setup(self) -> None:
        super().setup()
        self.server.script.connections += 1

    def do_POST(self) -> None:
        self.said = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.script.requests.append(f"{self.command} {self.path}")
        self.server.script.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.server.script.answer(self)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def decode_request(self) -> DecodeRequest:
        headers = {name.lower(): value for name, value in self.headers.items()}
        return DecodeRequest.from_http(parse_qsl(urlsplit(self.path).query), headers, self.said)

    def reply(self, status: int, headers: dict[str, str], body: bytes | memoryview, length: int | None = None) -> None:
        """Answer; `length` other than None is what Content-Length claims."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def reply_result(self, result: Result) -> None:
        self.reply(200, *result.to_http())


class _Server(ThreadingHTTPServer):
    script: ScriptedServer

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is part of the script."""


class ScriptedServer:
    """`with ScriptedServer(answer) as server:` calls `answer(exchange)` for every request, each in its connection's thread.

    Attributes:
        url: the endpoint to give to a client.
        connections: how many were opened.
        requests: request lines, in the order they came in.
        headers: theirs.
    """

    def __init__(self, answer: Callable[[Exchange], None]) -> None:
        self.answer = answer
        self.connections = 0
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._server = _Server(("127.0.0.1", 0), Exchange)
        self._server.script = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/model"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
