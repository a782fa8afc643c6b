"""Failures of the layers below us, provoked for real: what of Serve's, uvicorn's and HAProxy's own answers reaches a client.

docs/errors.md has the whole table. Under plain `serve run` they are text; under the launcher they are the contract's JSON, but
for what no code of ours sees. A client of ours gets one of our errors for each of them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import troubled_apps
from haproxy_binary import why_no_haproxy
from limits import WAIT_S
from local_server import LocalServer, living
from raw_http import Answer, connect, exchange, speak
from remote_vae import errors
from remote_vae.errors import RemoteVAEError
from remote_vae_serve.middleware import serve_errors
from remote_vae_serve.published_paths import BY_INGRESS
from samples import latents

pytestmark = pytest.mark.slow  # three servers, and proxies that are killed
QUERY = "shape=1&shape=4&shape=8&shape=8&dtype=float32"
BODY = latents(1, 4, 8, 8).numpy().tobytes()
DECODE_S = 2.0
CUT = Answer(0, {}, b"")
PLAIN = (sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local")
LAUNCHER = (sys.executable, "-m", "remote_vae_serve.cli", "run", "--proxy")
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def _applications(config: dict[str, Any]) -> None:
    ingress = next(app for app in config["applications"] if app["name"] == "remote-vae")
    ingress["args"].update(max_body_mib=1, request_timeout_s=4)
    models = [
        {
            "name": name,
            "route_prefix": None,
            "import_path": "remote_vae_serve.app:vae",
            "args": {"source": "nowhere", "fake": {"decode_s": decode_s}, "num_cpus": 0},
        }
        for name, decode_s in (("fake", 0), ("slow", DECODE_S))
    ]
    troubled = [
        {"name": name, "route_prefix": f"/troubled/{name}", "import_path": f"troubled_apps:{name}"}
        for name in ("raises", "fails")
    ]
    config["applications"] = [ingress, *models, *troubled]


@dataclass
class Mode:
    """A running server, how it was started, and what it answered before its application was there."""

    name: str
    server: LocalServer
    before: list[Answer] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        return self.name == "plain"

    @property
    def has_haproxy(self) -> bool:
        return self.name == "haproxy"

    def ask(
        self, path: str, method: str = "GET", headers: bytes = b"", body: bytes = b"", wait_s: float = WAIT_S
    ) -> Answer:
        length = b"Content-Length: %d\r\n" % len(body) if body else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode() + headers + length + b"\r\n"
        return exchange(self.server.url, head, body, timeout_s=wait_s)

    def begin_slow_decode(self, is_first: bool = True, way: str = BY_INGRESS) -> socket.socket:
        """A request in the middle of being answered, by way of the ingress, which may be the second on its connection."""
        head = f"POST {way}/slow?{QUERY} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
        connection = connect(self.server.url, timeout_s=WAIT_S)
        if not is_first:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            while not connection.recv(65536).endswith(b"}"):
                pass
        connection.sendall(head + BODY)
        time.sleep(DECODE_S / 2)
        return connection

    def knock(self) -> None:
        """Note what a server says that has no application yet."""
        try:
            answer = self.ask("/fake", wait_s=2)
        except OSError:
            return
        if answer.status not in (0, 200):
            self.before.append(answer)


def _environment(name: str) -> dict[str, str]:
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    if name == "haproxy":
        environment["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
    return environment


@pytest.fixture(scope="module", params=["plain", "launcher", "haproxy"])
def mode(request: pytest.FixtureRequest) -> Iterator[Mode]:
    name = str(request.param)
    if name == "haproxy" and (reason := why_no_haproxy()) is not None:
        pytest.skip(reason)
    command = {"plain": PLAIN, "launcher": (*LAUNCHER, "python"), "haproxy": (*LAUNCHER, "haproxy")}[name]
    server = LocalServer(models=("fake", "slow"), change=_applications, command=command, environment=_environment(name))
    running = Mode(name, server)
    server.start(tick=running.knock)
    try:
        yield running
        if not running.is_plain:
            _assert_that_it_leaves_nothing(server)
    finally:
        server.stop()


def _assert_that_it_leaves_nothing(server: LocalServer) -> None:
    """SIGTERM to all of its group, as a supervisor sends it: a HAProxy that is told so too is not to be started again."""
    started = server.processes()
    os.killpg(server.launched.pid, signal.SIGTERM)
    server.launched.wait(WAIT_S)
    give_up = time.monotonic() + WAIT_S
    while living(started):
        assert time.monotonic() < give_up
        time.sleep(0.2)


def assert_text(answer: Answer, status: int, words: str, kind: type[RemoteVAEError]) -> None:
    """What a stranger says, and our error for it."""
    assert (answer.status, answer.fields) == (status, None), answer
    assert words in answer.body.decode()
    error = errors.parse(answer.status, answer.headers, answer.body)
    assert type(error) is kind
    assert str(status) in error.message
    assert words in error.message


def assert_json(answer: Answer, status: int, kind: type[RemoteVAEError], is_coming_up: bool = False) -> None:
    assert (answer.status, answer.content_type) == (status, "application/json"), answer
    assert answer.fields is not None, answer
    assert answer.fields["request_id"] == answer.headers["x-request-id"]
    assert troubled_apps.SECRET not in answer.fields["error"]
    error = errors.parse(answer.status, answer.headers, answer.body)
    assert type(error) is kind
    assert error.message == answer.fields["error"]
    retried = isinstance(error, errors.Unavailable) or is_coming_up
    assert (error.retry_after is not None) == retried


def test_before_there_is_an_application_a_404_comes(mode: Mode) -> None:
    """HAProxy writes that one itself, in its configuration."""
    assert mode.before
    for answer in mode.before:
        assert_nothing_is_served(mode, answer, "/fake")


def assert_nothing_is_served(mode: Mode, answer: Answer, path: str) -> None:
    if mode.is_plain:
        assert_text(answer, 404, f"Path '{path}' not found", errors.UnknownRoute)
    else:
        assert_json(answer, 404, errors.UnknownRoute, is_coming_up=True)
        assert answer.fields is not None
        assert answer.fields["error"] == serve_errors.nothing_at(path).message


def test_a_path_that_is_none_is_a_404(mode: Mode) -> None:
    """HAProxy knows no path there."""
    assert_nothing_is_served(mode, mode.ask("*", "OPTIONS"), "" if mode.has_haproxy else "*")


def test_what_a_long_query_or_many_cookies_need_is_read_in_every_mode(mode: Mode) -> None:
    assert_json(mode.ask("/" + "n" * 60_000), 404, errors.UnknownModel)
    for headers in (b"a: " + b"b" * 60_000 + b"\r\n", b"a: b\r\n" * 900):
        assert mode.ask("/fake", headers=headers).status == 200


def test_haproxys_errors_once_it_has_read_the_headers_are_json(mode: Mode) -> None:
    connection = connect(mode.server.url, timeout_s=WAIT_S)
    connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n")
    time.sleep(0.5)
    answer = speak(connection, b"no chunk\r\n")
    if mode.has_haproxy:
        assert_json(answer, 400, errors.BadRequest)
    else:
        assert_text(answer, 400, "Invalid HTTP request received.", errors.BadRequest)


def test_whoever_answers_http_was_asked_for_our_middleware(mode: Mode) -> None:
    """Replicas behind HAProxy, too: those of the ingress and of each application with a path."""
    log = mode.server.log.read_text(errors="replace")
    names = {
        "plain": (),
        "launcher": ("SERVE_PROXY",),
        "haproxy": ("fallback proxy", "SERVE_REPLICA::remote-vae#Ingress"),
    }
    for name in names[mode.name]:
        assert f"Tokens and size limit are in place: {name}" in log


def test_serves_own_pages_are_its_own_in_every_mode(mode: Mode) -> None:
    assert mode.ask("/-/healthz").body == b"success"
    assert mode.ask("/-/routes").headers["content-type"] == "application/json"


def test_an_application_that_could_not_be_deployed_is_a_503(mode: Mode) -> None:
    """Once it is certain: Serve leaves a request that came before its last try to whoever waits for it."""
    give_up = time.monotonic() + WAIT_S
    while (answer := mode.ask("/troubled/fails", wait_s=5)) == CUT:
        assert time.monotonic() < give_up
    if mode.is_plain:
        assert_text(answer, 503, "it failed to deploy", errors.Unavailable)
    else:
        assert_json(answer, 503, errors.Unavailable)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_ingress_that_raises_is_a_500_and_says_nothing_of_the_inside(mode: Mode, method: str) -> None:
    answer = mode.ask("/troubled/raises/now", method, body=BODY)
    if mode.is_plain:
        assert_text(answer, 500, "Internal Server Error", errors.Unavailable)
    else:
        assert_json(answer, 500, errors.InternalError)


def test_a_full_queue_of_the_ingress_is_a_503(mode: Mode) -> None:
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda: answers.append(mode.ask("/troubled/raises/sleep", wait_s=WAIT_S)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status != 200]
    assert refused
    for answer in refused:
        if mode.is_plain:
            assert_text(answer, 503, "backpressure", errors.Unavailable)
        else:
            assert_json(answer, 503, errors.Overloaded)


def test_serves_time_out_is_a_408_or_our_504(mode: Mode) -> None:
    answer = mode.ask(f"/slow?{QUERY}", "POST", b"X-Request-Timeout-Seconds: 0.2\r\n", BODY)
    if mode.is_plain:
        assert_text(answer, 408, "timed out", errors.DeadlineExceeded)
    else:
        assert_json(answer, 504, errors.DeadlineExceeded)


def test_our_own_deadline_comes_first_where_the_client_is_too_slow(mode: Mode) -> None:
    head = f"POST /fake?{QUERY} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    assert_json(exchange(mode.server.url, head, BODY[:10], timeout_s=WAIT_S), 504, errors.DeadlineExceeded)


@pytest.mark.parametrize("method", ["OPTIONS", "PATCH", "TRACE", "PROPFIND"])
def test_a_method_that_http_has_and_we_do_not_is_our_405_in_every_mode(mode: Mode, method: str) -> None:
    assert_json(mode.ask("/fake/decode", method), 405, errors.WrongMethod)


def test_a_body_over_the_limit_is_our_413_in_every_mode(mode: Mode) -> None:
    for headers in (b"", b"Expect: 100-continue\r\n"):
        answer = mode.ask(f"/fake?{QUERY}", "POST", headers + b"Content-Length: 9000000\r\n")
        assert_json(answer, 413, errors.BodyTooLarge)


def test_a_body_that_waits_to_be_asked_for_is_asked_for(mode: Mode) -> None:
    answer = mode.ask(f"/fake?{QUERY}", "POST", b"Expect: 100-continue\r\n", BODY)
    assert (answer.status, answer.content_type) == (200, "image/jpeg")


@pytest.mark.parametrize("header", [b"x-request-id", b"x-request-timeout-seconds"])
def test_a_header_that_is_no_utf8_is_nobodys_fault_under_the_launcher(mode: Mode, header: bytes) -> None:
    answer = mode.ask(f"/fake?{QUERY}", "POST", header + b": \xff\xfe\r\n", BODY)
    if mode.is_plain:
        assert_text(answer, 500, "Internal Server Error", errors.Unavailable)
    else:
        assert (answer.status, answer.content_type) == (200, "image/jpeg")


POST = f"POST /fake?{QUERY} HTTP/1.1\r\nHost: x\r\n".encode()
MALFORMED = {
    "no HTTP": b"hello there\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(197),
    "a header without a colon": b"GET /fake HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n",
    "a length that is no number": POST + b"Content-Length: abc\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
    "a chunk that is none": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a path too long": b"GET /" + b"n" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a method of one's own": b"FOO /fake HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_http_is_a_400_in_text_in_every_mode(mode: Mode, what: str) -> None:
    """uvicorn and HAProxy say it before any code of ours is asked."""
    answer = exchange(mode.server.url, MALFORMED[what])
    if mode.has_haproxy and what != "a method of one's own":
        assert_text(answer, 400, "Your browser sent an invalid request.", errors.BadRequest)
        assert answer.content_type == "text/html"
    else:
        assert_text(answer, 400, "Invalid HTTP request received.", errors.BadRequest)
        assert answer.content_type == "text/plain; charset=utf-8"


def test_a_websocket_is_turned_away_with_a_sentence(mode: Mode) -> None:
    answer = mode.ask("/fake", headers=WEBSOCKET)
    if mode.is_plain:
        assert (answer.status, answer.body) == (403, b"")
    else:
        assert_json(answer, 405, errors.WrongMethod)


@pytest.mark.parametrize("is_first", [True, False])
def test_an_ingress_killed_in_the_middle_of_a_request_is_said_so(mode: Mode, is_first: bool) -> None:
    """HAProxy by itself would cut the connection of a request that is not the first, or goes by one of its own that was used.

    Its 503 is that of the proxy behind it, to which it turns while an ingress is being replaced.
    """
    mode.ask("/health")
    with mode.begin_slow_decode(is_first) as connection:
        _kill(mode.server, "ServeReplica:remote-vae:Ingress")
        answer = speak(connection)
    if mode.is_plain:
        assert_text(answer, 500, "Internal Server Error", errors.Unavailable)
    else:
        assert_json(answer, 502 if mode.has_haproxy and answer.status != 503 else 503, errors.Unavailable)
    give_up = time.monotonic() + WAIT_S
    while mode.ask(f"{BY_INGRESS}/fake", wait_s=5).status != 200:
        assert time.monotonic() < give_up
        time.sleep(0.2)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_models_replica_killed_in_the_middle_of_a_request_is_said_so(mode: Mode, is_first: bool) -> None:
    """At the model's own path, where it has one, and at the ingress."""
    for _ in range(3):  # connections to it that have been used
        assert mode.ask("/slow").status == 200
    with mode.begin_slow_decode(is_first, "") as connection:
        _kill(mode.server, "ServeReplica:slow:")
        answer = speak(connection)
    assert_json(answer, 502 if mode.has_haproxy else 503, errors.Unavailable)
    assert answer.headers["retry-after"]
    give_up = time.monotonic() + WAIT_S
    while mode.ask(f"/slow?{QUERY}", "POST", body=BODY, wait_s=10).status != 200:
        assert time.monotonic() < give_up
        time.sleep(0.2)


def test_a_proxy_killed_in_the_middle_of_a_request_cuts_the_connection(mode: Mode) -> None:
    """Nobody is left to say anything. The last test of each mode: it leaves no proxy behind."""
    with mode.begin_slow_decode() as connection:
        _kill(mode.server, "haproxy -" if mode.has_haproxy else "ProxyActor")
        assert speak(connection) == CUT


def _kill(server: LocalServer, name: str) -> None:
    """Kill every process of the server with the words in its command. One may just be taking over from another."""
    give_up = time.monotonic() + WAIT_S
    while not (found := server.processes(name)):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
