"""HTTP written by hand: what comes back on a socket to bytes that no client library would send."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from limits import WAIT_S


@dataclass(frozen=True)
class Answer:
    """What came back. `status` is 0 where nothing did that is HTTP; `body` is then whatever came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")

    @property
    def fields(self) -> dict[str, Any] | None:
        """The contract's JSON (`error`, `code`, `request_id`), or None where the body is anything else."""
        try:
            fields = json.loads(self.body)
        except ValueError:
            return None
        is_ours = isinstance(fields, dict) and all(fields.get(name) for name in ("error", "code", "request_id"))
        return fields if is_ours else None


def exchange(url: str, *pieces: bytes, timeout_s: float = WAIT_S) -> Answer:
    """Send the pieces to the server, and read the first final answer until its end, the connection's or the time's."""
    return speak(connect(url, timeout_s), *pieces)


def connect(url: str, timeout_s: float = WAIT_S) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=timeout_s)


def speak(connection: socket.socket, *pieces: bytes) -> Answer:
    """The same over a connection that is there; closes it."""
    received = b""
    with connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except OSError:
            pass  # hung up before it was all sent: the answer may be there all the same
        try:
            while not _is_whole(received) and (more := connection.recv(65536)):
                received += more
        except OSError:  # the time-out, or a reset
            pass
    return _read(received)


def _read(received: bytes) -> Answer:
    while (interim := re.match(rb"HTTP/1\.[01] 1\d\d[^\r]*\r\n(?:[^\r]+\r\n)*\r\n", received)) is not None:
        received = received[interim.end() :]
    head, _, body = received.partition(b"\r\n\r\n")
    start, *lines = head.decode("latin-1").split("\r\n")
    status = re.match(r"HTTP/1\.[01] (\d{3})", start)
    if status is None:
        return Answer(0, {}, received)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding", "") == "chunked":
        body = b"".join(re.findall(rb"[0-9a-f]+\r\n(.*?)\r\n", body, re.DOTALL))
    return Answer(int(status[1]), headers, body)


def _is_whole(received: bytes) -> bool:
    answer = _read(received)
    if answer.headers.get("transfer-encoding") == "chunked":
        return received.endswith(b"0\r\n\r\n")
    length = answer.headers.get("content-length", "")
    return answer.status != 0 and length.isdecimal() and len(answer.body) >= int(length)
