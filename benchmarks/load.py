"""The load: clients that post one request over kept-alive connections, in a process of their own.

    echo '{"url": ..., "body": <path>, "clients": 8, "seconds": 2}' | python -m benchmarks.load <file for the result>

Written for this instead of taken from a library: on few cores the client must cost next to nothing, or it is the client that
is measured. Answers are read into one buffer and counted; only the first one of each connection is kept.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
KEPT = 2**24


@dataclass(frozen=True)
class Load:
    """What is asked, and how often.

    Attributes:
        url: with its query.
        body: path of the file that is posted.
        clients: connections; each sends its next request when it has its answer.
        seconds: how long. What is under way then is still awaited and counted.
        rate: requests a second over all connections, at random moments (evenly spaced, short ones would never meet), whether
            or not answers come; a latency is then counted from the moment the request was due. None sends as fast as
            answers come.
        count: end after so many requests, for seconds at most.
        headers: sent with each.
        warm_up: requests of each client before anything counts.
        with_requests: one client that is the library `requests`, with what it takes itself: as diffusers' users have it.
    """

    url: str
    body: str
    clients: int = 1
    seconds: float = 2.0
    rate: float | None = None
    count: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    warm_up: int = 3
    with_requests: bool = False

    def run(self) -> Answers:
        """In a process of its own. Raises RuntimeError where that fails."""
        return self.start().wait()

    def start(self) -> Running:
        # A file for what it found: of a pipe, the last kilobytes of a large answer were lost now and then.
        folder = tempfile.TemporaryDirectory(prefix="bench-load-")
        found = Path(folder.name) / "found.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load", str(found)], stdin=subprocess.PIPE, cwd=ROOT, text=True
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(self)))
        process.stdin.close()
        return Running(self, process, folder, found)


@dataclass(frozen=True, eq=False)
class Running:
    """A load that is under way."""

    load: Load
    process: subprocess.Popen[str]
    folder: tempfile.TemporaryDirectory[str]
    found: Path

    def wait(self) -> Answers:
        with self.folder:
            if self.process.wait() != 0:
                raise RuntimeError(f"the load on {self.load.url} failed")
            return Answers(**json.loads(self.found.read_text()))


@dataclass(frozen=True)
class Answers:
    """What came back.

    Attributes:
        latencies_ms: of the answers with status 200, in the order they came.
        statuses: how many of each, "lost" where the connection broke.
        wall_s: from the first request to the last answer.
        began: the moment of the first request, on the monotonic clock that all processes share.
        client_s: processor time that the client itself took in that time.
        stages: median of each stage that `server-timing` names, in milliseconds.
        first: one whole answer, base64; empty where it is larger than KEPT.
    """

    latencies_ms: list[float]
    statuses: dict[str, int]
    wall_s: float
    began: float
    client_s: float
    stages: dict[str, float]
    first: str

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies_ms) / self.wall_s

    @property
    def p50(self) -> float:
        return statistics.median(self.latencies_ms)

    @property
    def p95(self) -> float:
        return sorted(self.latencies_ms)[int(0.95 * (len(self.latencies_ms) - 1))]

    @property
    def body(self) -> bytes:
        return base64.b64decode(self.first)

    @property
    def failed(self) -> int:
        return sum(count for status, count in self.statuses.items() if status != "200")


class Connection(asyncio.BufferedProtocol):
    """One kept-alive HTTP/1.1 connection that has one request under way."""

    def __init__(self) -> None:
        self._space = bytearray(2**20)
        self._head = b""
        self._left: int | None = None
        self._kept: list[bytes] | None = []
        self._answer: asyncio.Future[int] | None = None
        self._status = 0
        self.closed = False
        self.first = b""
        self.headers: dict[str, str] = {}

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[int]:
        """The status, when the whole answer is there; ConnectionError where it does not come."""
        self._head, self._left = b"", None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        start = 0
        if self._left is None:
            had = len(self._head)
            self._head += bytes(self._space[: min(nbytes, 65536)])
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_head(self._head[:end])
            start = end + 4 - had
        assert self._left is not None
        self._left -= nbytes - start
        if self._kept is not None:
            self._kept.append(bytes(self._space[start:nbytes]))
        if self._left <= 0 and self._answer is not None:
            if self._kept is not None:
                self.first, self._kept = b"".join(self._kept), None
            answer, self._answer = self._answer, None
            answer.set_result(self._status)

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self._status = int(first.split(" ", 2)[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._left = int(self.headers["content-length"])
        if self._left > KEPT:
            self._kept = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._answer is not None:
            self._answer.set_exception(ConnectionError("the server closed the connection"))
            self._answer = None


async def run(load: Load) -> Answers:
    parts = urlsplit(load.url)
    body = Path(load.body).read_bytes()
    lines = [f"POST {parts.path}?{parts.query} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}",
             *(f"{name}: {value}" for name, value in load.headers.items())]  # fmt: skip
    request = "\r\n".join([*lines, "", ""]).encode() + body
    loop = asyncio.get_running_loop()
    connections: list[Connection] = []

    async def connect() -> Connection:
        return (await loop.create_connection(Connection, parts.hostname, parts.port))[1]

    async def warm(connection: Connection) -> None:
        for _ in range(load.warm_up):
            await connection.ask(request)

    for _ in range(load.clients):
        connections.append(await connect())
    await asyncio.gather(*map(warm, connections))
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    stages: dict[str, list[float]] = {}
    began, cpu = time.perf_counter(), time.process_time()
    sent = 0
    chance, next_at = random.Random(0), began  # the same moments each time

    def due() -> float | None:
        """When the next request is to be sent; None at the end."""
        nonlocal sent, next_at
        if load.rate is not None:
            next_at += chance.expovariate(load.rate)
        at = time.perf_counter() if load.rate is None else next_at
        if at - began >= load.seconds or sent == load.count:
            return None
        sent += 1
        return at

    async def client(connection: Connection) -> None:
        while (at := due()) is not None:
            await asyncio.sleep(max(0.0, at - time.perf_counter())) if load.rate else None
            if connection.closed:  # idle for longer than the server keeps one
                connection = await connect()
            try:
                status = await connection.ask(request)
            except ConnectionError:
                statuses["lost"] += 1
                connection = await connect()
                continue
            statuses[str(status)] += 1
            if status == 200:
                latencies.append((time.perf_counter() - at) * 1000)
            for stage in connection.headers.get("server-timing", "").split(","):
                name, _, ms = stage.strip().partition(";dur=")
                if ms:
                    stages.setdefault(name, []).append(float(ms))

    await asyncio.gather(*map(client, connections))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    medians = {name: statistics.median(values) for name, values in stages.items()}
    first = base64.b64encode(connections[0].first).decode()
    return Answers(latencies, dict(statuses), wall, began, cpu, medians, first)


def run_with_requests(load: Load) -> Answers:
    """One request after the other."""
    import requests

    body = Path(load.body).read_bytes()
    statuses: Counter[str] = Counter()
    latencies: list[float] = []
    with requests.Session() as session:
        for _ in range(load.warm_up):
            first = session.post(load.url, data=body, headers=load.headers).content
        began, cpu = time.perf_counter(), time.process_time()
        while (at := time.perf_counter()) - began < load.seconds:
            answer = session.post(load.url, data=body, headers=load.headers)
            statuses[str(answer.status_code)] += 1
            if answer.ok:
                latencies.append((time.perf_counter() - at) * 1000)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Answers(latencies, dict(statuses), wall, began, cpu, {}, base64.b64encode(first).decode())


def main() -> None:
    import uvloop

    load = Load(**json.load(sys.stdin))
    answers = run_with_requests(load) if load.with_requests else uvloop.run(run(load))
    Path(sys.argv[1]).write_text(json.dumps(asdict(answers)))


if __name__ == "__main__":
    main()
