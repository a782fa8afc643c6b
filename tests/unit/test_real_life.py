"""What a client meets in real life: servers that are busy, starting, gone or half gone; how often it tries again, and its
token. Deadlines are in `test_deadlines`, the fallback is in `test_fallback`."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from failing_server import Answer, Z, cut, decode, echo, hang_up, in_turn, no_http, raising, saying, skip_sleeps
from remote_vae import AsyncRemoteVAE, RemoteVAE, errors, remote_decode, remote_encode
from remote_vae.errors import BadRequest, ConnectionFailed, DeadlineExceeded, RemoteVAEError, Unavailable
from remote_vae.protocol.result import Result
from remote_vae.transports import transport
from scripted_server import Exchange, ScriptedServer, _Server


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return skip_sleeps(monkeypatch)


@pytest.mark.parametrize(
    "failure",
    [saying(503), raising(errors.ModelStarting("Wait.")), raising(Unavailable("Gone.")), saying(429), cut, hang_up],
    ids=["503", "starting", "unavailable", "429", "cut", "hang up"],
)
def test_what_passes_is_waited_out(slept: list[float], failure: Answer) -> None:
    with in_turn(failure, failure, echo) as server:
        assert torch.equal(decode(server.url, Z + 3), Z + 3)
    assert len(server.requests) == 3
    assert [round(pause / 0.5) for pause in slept] == [1, 2]


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_kept(slept: list[float], status: int) -> None:
    with in_turn(saying(status, retry_after="7"), echo) as server:
        decode(server.url)
    (pause,) = slept
    assert 7 <= pause <= 7 * 1.25


@pytest.mark.parametrize("header", ["nan", "inf", "-1", "Wed, 21 Oct 2026 07:28:00 GMT", "1e999"])
def test_a_retry_after_without_sense_is_a_pause_like_any_other(slept: list[float], header: str) -> None:
    with in_turn(saying(503, retry_after=header), echo) as server:
        decode(server.url)
    (pause,) = slept
    assert 0.5 <= pause <= 0.5 * 1.25


def test_a_server_that_asks_for_a_day_gets_its_error_raised(slept: list[float]) -> None:
    with in_turn(saying(503, retry_after="86400"), echo) as server, pytest.raises(Unavailable) as caught:
        decode(server.url)
    assert (caught.value.retry_after, slept) == (86400, [])


def test_a_server_that_comes_up_while_one_waits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    servers = []

    def start_it(_: float) -> None:
        server = _Server(("127.0.0.1", port), Exchange)
        server.script = SimpleNamespace(connections=0, requests=[], headers=[], answer=echo)  # type: ignore[assignment]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)

    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=time.monotonic, sleep=start_it))
    assert torch.equal(decode(f"http://127.0.0.1:{port}/model"), Z)
    (server,) = servers
    server.shutdown()
    server.server_close()


def test_a_server_that_takes_no_connection_in_time_is_tried_again(slept: list[float]) -> None:
    with socket.socket() as full, closed_in_the_end() as crowd:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # the queue of connections that nobody accepts is full: the next SYN is dropped
            crowd.append(socket.socket())
            crowd[-1].setblocking(False)
            crowd[-1].connect_ex(full.getsockname())
        with pytest.raises(ConnectionFailed, match="cannot be reached"):
            decode(f"http://127.0.0.1:{full.getsockname()[1]}/model", timeout=(0.1, 5), retries=1)
    assert len(slept) == 1


@contextmanager
def closed_in_the_end() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for one in sockets:
        one.close()


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (saying(400), BadRequest), (saying(401), errors.Unauthorized), (saying(404), errors.UnknownModel),
        (saying(413), errors.BodyTooLarge), (saying(500), errors.InternalError), (saying(502), errors.InternalError),
        (saying(504), DeadlineExceeded), (raising(errors.ModelFailed("Gone.", retry_after=1)), errors.ModelFailed),
        (saying(200, b"<html>"), errors.BrokenReply), (no_http, errors.BrokenReply),
        (saying(307, location="/model"), errors.BrokenReply),
        (saying(200, b"garbage", content_encoding="gzip"), errors.BrokenReply),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_raised_at_once(slept: list[float], failure: Answer, kind: type[RemoteVAEError]) -> None:
    with in_turn(failure) as server, pytest.raises(kind) as caught:
        decode(server.url)
    assert type(caught.value) is kind
    assert slept == []


def test_an_error_after_all_tries_has_its_class_and_its_request_id(slept: list[float]) -> None:
    failures = [raising(errors.Overloaded("Full.", retry_after=1, request_id=f"r-{number}")) for number in range(4)]
    with in_turn(*failures) as server, pytest.raises(errors.Overloaded) as caught:
        decode(server.url)
    assert (caught.value.request_id, len(server.requests)) == ("r-3", 4)


def test_an_encode_and_a_description_are_tried_again_too(slept: list[float]) -> None:
    def encoded(exchange: Exchange) -> None:
        exchange.reply_result(Result("tensor/binary", np.zeros(4, np.uint8), "float32", (1, 1, 1, 1)))

    with in_turn(saying(503), encoded) as server:
        remote_encode(server.url, np.zeros((1, 3, 8, 8), np.float32))
    with in_turn(saying(503), saying(200, b'{"state": "cold"}')) as server, RemoteVAE(server.url) as vae:
        assert vae.describe() == {"state": "cold"}
    assert len(slept) == 2


def test_base64_is_retried_with_the_same_body(slept: list[float]) -> None:
    said = []

    def remember(exchange: Exchange) -> None:
        said.append(exchange.said)
        (saying(503) if len(said) < 3 else echo)(exchange)

    with ScriptedServer(remember) as server:
        assert torch.equal(decode(server.url, Z + 1, input_tensor_type="base64"), Z + 1)
    assert len(set(said)) == 1 < len(said)


def test_one_refused_picture_of_a_batch_stops_the_rest() -> None:
    """Nobody gets their pictures: `asyncio.gather` alone would go on sending them all."""
    refused = raising(BadRequest("Not this one."))

    def slow(exchange: Exchange) -> None:
        time.sleep(0.05)
        refused(exchange)

    batch = torch.zeros(40, 4, 2, 2)

    async def outlive(url: str) -> None:
        async with AsyncRemoteVAE(url) as vae:
            with pytest.raises(BadRequest):
                await vae.decode(batch)
            await asyncio.sleep(0.4)

    with ScriptedServer(slow) as server:
        with pytest.raises(BadRequest):
            remote_decode(server.url, batch)
        assert len(server.requests) < 20
    with ScriptedServer(slow) as server:
        asyncio.run(outlive(server.url))
        assert len(server.requests) < 20


# Tokens


def test_a_token_is_a_bearers() -> None:
    with ScriptedServer(echo) as server:
        decode(server.url, token="s3cret")
        decode(server.url)
    assert [headers.get("authorization") for headers in server.headers] == ["Bearer s3cret", None]


def test_a_token_wins_over_netrc_and_over_the_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("default login joe password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with ScriptedServer(echo) as server:
        decode(server.url, token="s3cret")
        decode(server.url.replace("http://", "http://:other@"), token="s3cret")
    assert {headers["authorization"] for headers in server.headers} == {"Bearer s3cret"}


def test_a_token_goes_to_no_other_host() -> None:
    def pass_on(exchange: Exchange) -> None:
        exchange.reply(307, {"location": other.url.removesuffix("/model") + exchange.path}, b"")

    with ScriptedServer(echo) as other, ScriptedServer(pass_on) as server:
        assert torch.equal(decode(server.url, Z + 1, token="s3cret"), Z + 1)
    assert "authorization" in server.headers[0]
    assert "authorization" not in other.headers[0]


@pytest.mark.parametrize("token", ["", "a\nb", "x-auth: a\r\n", "häßlich", "\x00"])
def test_a_token_that_is_no_header_is_refused_unseen(token: str) -> None:
    with pytest.raises(BadRequest, match="token is empty or holds") as caught:
        RemoteVAE("http://127.0.0.1:1/model", token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://:s3cret@127.0.0.1:1/model", "http://user:s3cret@127.0.0.1:1/model", "htp://:s3cret@127.0.0.1/model",
        "http://:s3cr/et@127.0.0.1/model", "http://:s3cret@/model", "http://:s3cret@127.0.0.1:port/model", ":s3cret@host",
    ],
)  # fmt: skip
@pytest.mark.parametrize("token", [None, "t0ken"])
def test_neither_message_nor_traceback_shows_a_token(endpoint: str, token: str | None) -> None:
    with pytest.raises(RemoteVAEError) as caught:
        decode(endpoint, token=token, retries=0)
    shown = str(caught.value) + "".join(traceback.format_exception(caught.value))
    lines = [line for line in shown.splitlines() if "decode(endpoint" not in line]
    assert "t0ken" not in "".join(lines)
    if endpoint != ":s3cret@host":  # which is no URL, and nothing in it is known to be a token
        assert "s3cr" not in "".join(lines)


@pytest.mark.parametrize("failure", [saying(401), saying(500), cut, no_http, saying(503)])
def test_no_failure_of_the_server_shows_the_token(slept: list[float], failure: Answer) -> None:
    with in_turn(failure) as server, pytest.raises(RemoteVAEError) as caught:
        decode(server.url, token="t0ken")
    assert "t0ken" not in "".join(traceback.format_exception(caught.value)).replace('token="t0ken"', "")
