"""The client against a real server on this machine: what goes wrong on the way, and how much goes on at once."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from failing_server import Z, echo
from limits import WAIT_S
from remote_vae import AsyncRemoteVAE, RemoteVAE, errors, remote_decode
from remote_vae.errors import BadRequest, BrokenReply, ConnectionFailed, RemoteVAEError, TimedOut
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import to_torch
from remote_vae.transports.http import HttpTransport
from remote_vae.transports.transport import IN_FLIGHT, Transport
from scripted_server import Exchange, ScriptedServer

ENDINGS = {"connection": "close", "content-type": "tensor/binary", "shape": "[2]", "dtype": "float32"}


def answering(status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> ScriptedServer:
    """Says the same to everybody."""
    return ScriptedServer(lambda exchange: exchange.reply(status, headers, body, length))


def describe_yourself(exchange: Exchange) -> None:
    exchange.reply(200, {"content-type": "application/json"}, b'{"name": "model", "state": "cold"}')


def decode(url: str, timeout: Any = WAIT_S, **options: Any) -> Any:
    return remote_decode(url, Z, output_type="pt", timeout=timeout, **{"retries": 0} | options)


def decode_async(url: str, timeout: Any = WAIT_S, **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncRemoteVAE(url, timeout=timeout, **{"retries": 0} | options) as vae:
            return await vae.decode(Z, output_type="pt")

    return asyncio.run(run())


def describe(url: str, timeout: Any = WAIT_S, **options: Any) -> Any:
    with RemoteVAE(url, timeout=timeout, **{"retries": 0} | options) as vae:
        return vae.describe()


CALLS = pytest.mark.parametrize("call", [decode, decode_async, describe])


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@CALLS
def test_a_refused_connection_raises_connection_failed(call: Callable[..., Any], closed_port: int) -> None:
    with pytest.raises(ConnectionFailed, match=f"127.0.0.1:{closed_port}.*is the server running"):
        call(f"http://127.0.0.1:{closed_port}/model")


@CALLS
@pytest.mark.parametrize("timeout", [0.15, (5.0, 0.15)], ids=str)
def test_a_silent_server_raises_timed_out(call: Callable[..., Any], timeout: Any) -> None:
    release = threading.Event()
    with ScriptedServer(lambda exchange: release.wait(WAIT_S)) as server:  # type: ignore[arg-type, return-value]
        with pytest.raises(TimedOut, match=r"0\.15"):
            call(server.url, timeout)
        release.set()


@CALLS
def test_a_server_that_falls_silent_in_its_answer_raises_timed_out(call: Callable[..., Any]) -> None:
    release = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.reply(200, ENDINGS, b"1234", length=8)
        release.wait(WAIT_S)

    with ScriptedServer(answer) as server:
        with pytest.raises(TimedOut):
            call(server.url, 0.15)
        release.set()


def test_a_time_out_is_for_the_whole_and_not_for_each_packet() -> None:
    def dribble(exchange: Exchange) -> None:
        exchange.reply(200, ENDINGS, b"", length=10**6)
        while not over.wait(0.1) and time.monotonic() < started + WAIT_S:
            exchange.wfile.write(b"x")

    over, started = threading.Event(), time.monotonic()
    with ScriptedServer(dribble) as server:
        with pytest.raises(TimedOut):
            decode(server.url, 0.3)
        over.set()


@CALLS
def test_a_cut_off_body_raises_broken_reply(call: Callable[..., Any]) -> None:
    with answering(200, ENDINGS, b"1234", length=1000) as server, pytest.raises(BrokenReply, match="in the middle"):
        call(server.url)


@CALLS
def test_a_connection_closed_without_an_answer_raises_connection_failed(call: Callable[..., Any]) -> None:
    def hang_up(exchange: Exchange) -> None:
        exchange.close_connection = True

    with ScriptedServer(hang_up) as server, pytest.raises(ConnectionFailed):
        call(server.url)


@CALLS
@pytest.mark.parametrize(
    "banner", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x15\x03\x01\x00\x02\x02\x46", b"HTTP/1.1 fine\r\n\r\n"]
)
def test_an_answer_that_is_no_http_raises_broken_reply(call: Callable[..., Any], banner: bytes) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.wfile.write(banner)
        exchange.close_connection = True

    with ScriptedServer(answer) as server, pytest.raises(BrokenReply):
        call(server.url)


@CALLS
@pytest.mark.parametrize(
    ("status", "content_type", "body", "kind"),
    [
        (502, "text/html", b"<html><h1>Bad Gateway</h1></html>", errors.InternalError),
        (503, "text/plain", b"", errors.Unavailable),
        (404, "application/json", b'{"detail": "Not Found"}', errors.UnknownModel),
        (429, "application/json", b'{"error": {"message": "slow down"}}', errors.Overloaded),
        (413, "text/html", b"nginx: too large", errors.BodyTooLarge),
        (401, "text/plain", b"\xff\xfe", errors.Unauthorized),
    ],
)
def test_a_strangers_error_page_raises_the_error_of_its_status(
    call: Callable[..., Any], status: int, content_type: str, body: bytes, kind: type[RemoteVAEError]
) -> None:
    with answering(status, {"content-type": content_type}, body) as server, pytest.raises(kind) as caught:
        call(server.url)
    assert type(caught.value) is kind


@CALLS
@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[1, 2]", b"null", b"\xff"])
def test_a_strangers_200_raises_broken_reply(call: Callable[..., Any], body: bytes) -> None:
    with answering(200, {"content-type": "application/json"}, body) as server, pytest.raises(BrokenReply):
        call(server.url)


@CALLS
def test_a_redirect_to_nowhere_raises_one_of_our_errors(call: Callable[..., Any]) -> None:
    def round_and_round(exchange: Exchange) -> None:
        exchange.reply(307, {"location": exchange.path}, b"")

    with ScriptedServer(round_and_round) as server, pytest.raises(BrokenReply):
        call(server.url)


@CALLS
def test_our_own_error_comes_through_whole(call: Callable[..., Any]) -> None:
    sent = errors.ModelFailed("The weights are gone.", retry_after=30, request_id="r-1")

    def answer(exchange: Exchange) -> None:
        exchange.reply(*errors.render(sent))

    with ScriptedServer(answer) as server, pytest.raises(errors.ModelFailed) as caught:
        call(server.url)
    assert (caught.value.message, caught.value.retry_after, caught.value.request_id) == (
        "The weights are gone.", 30, "r-1",
    )  # fmt: skip


def test_a_model_describes_itself_to_both_clients() -> None:
    async def run(url: str) -> Any:
        async with AsyncRemoteVAE(url) as vae:
            return await vae.describe()

    with ScriptedServer(describe_yourself) as server:
        assert describe(server.url) == asyncio.run(run(server.url)) == {"name": "model", "state": "cold"}
        assert server.requests == ["GET /model"] * 2


@pytest.mark.parametrize("endpoint", [None, 3, b"http://127.0.0.1", ("http://127.0.0.1",), object], ids=repr)
@pytest.mark.parametrize("client", [RemoteVAE, AsyncRemoteVAE])
def test_an_endpoint_of_a_wrong_type_is_refused(client: type, endpoint: object) -> None:
    with pytest.raises(BadRequest, match=f"endpoint is a {type(endpoint).__name__}") as caught:
        client(endpoint)
    assert caught.value.parameter == "endpoint"


@pytest.mark.parametrize(
    "endpoint", ["", "model", "127.0.0.1:8000/model", "ftp://host/model", "file:///etc/passwd", "http//host"]
)
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(BadRequest, match="endpoint is") as caught:
        RemoteVAE(endpoint)
    assert caught.value.parameter == "endpoint"


@pytest.mark.parametrize(
    "endpoint", ["http://", "http:///model", "http://[::1", "http://127.0.0.1:port/model", "http://*/x"]
)
def test_a_url_without_a_usable_host_is_refused_at_the_latest_by_the_first_call(endpoint: str) -> None:
    with pytest.raises(BadRequest, match="endpoint is") as caught:
        decode(endpoint)
    assert caught.value.parameter == "endpoint"


def test_path_query_and_password_of_an_endpoint_are_kept() -> None:
    with ScriptedServer(echo) as server:
        decode(server.url.replace("http://", "http://:secret@") + "/decode?tenant=7")
    assert server.requests[0].startswith("POST /model/decode?tenant=7&shape=1&shape=4&")
    assert server.headers[0]["authorization"] == "Basic " + base64.b64encode(b":secret").decode()


def test_one_connection_serves_one_request_after_the_other() -> None:
    with ScriptedServer(echo) as server, RemoteVAE(server.url) as vae:
        for number in range(5):
            assert vae.decode(Z + number, output_type="pt").unique().tolist() == [number]
        assert (len(server.requests), server.connections) == (5, 1)


def test_an_error_leaves_the_connection_usable() -> None:
    def first_refuse(exchange: Exchange) -> None:
        first = len(server.requests) == 1
        return exchange.reply(*errors.render(BadRequest("No."))) if first else echo(exchange)

    with ScriptedServer(first_refuse) as server, RemoteVAE(server.url) as vae:
        with pytest.raises(BadRequest):
            vae.decode(Z, output_type="pt")
        assert torch.equal(vae.decode(Z, output_type="pt"), Z)
        assert server.connections == 1


def test_a_connection_that_the_server_closed_in_the_meantime_is_opened_anew() -> None:
    def last_words(exchange: Exchange) -> None:
        echo(exchange)
        exchange.close_connection = True  # without saying so in a header

    with ScriptedServer(last_words) as server, RemoteVAE(server.url) as vae:
        for _ in range(3):
            vae.decode(Z, output_type="pt")
            time.sleep(0.05)
        assert server.connections == 3


@pytest.mark.parametrize("call", [decode, decode_async])
def test_both_clients_send_the_same_bytes(call: Callable[..., Any]) -> None:
    with ScriptedServer(echo) as server:
        assert torch.equal(call(server.url), Z)
        assert torch.equal(decode(server.url), Z)
    assert server.requests[0] == server.requests[1]
    assert server.headers[0] == server.headers[1]


class Memory(Transport):
    """A transport of the user's own: answers each request with its latents and remembers how many came at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = 0
        self.closed = False

    def try_one(self, request: Any) -> Result:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        with self._lock:
            self.now -= 1
        raw = request.latents
        return Result("tensor/binary", raw.data, raw.dtype, raw.shape)

    async def try_one_async(self, request: Any) -> Result:
        return await asyncio.to_thread(self.try_one, request)

    def describe(self, wake: bool = False) -> ModelDescription:
        return ModelDescription(state="ready")

    async def describe_async(self, wake: bool = False) -> ModelDescription:
        return self.describe()

    def close(self) -> None:
        self.closed = True


def test_a_transport_of_ones_own_takes_the_place_of_an_endpoint_and_is_closed_with_the_client() -> None:
    memory = Memory()
    with RemoteVAE(memory) as vae:
        assert torch.equal(vae.decode(Z, output_type="pt"), Z)
        assert vae.describe() == {"state": "ready"}
    assert memory.closed

    async def run() -> Any:
        async with AsyncRemoteVAE(memory) as vae:
            return await vae.decode(Z, output_type="pt")

    assert torch.equal(asyncio.run(run()), Z)


def test_the_requests_of_one_call_go_side_by_side_within_the_bound_and_come_back_in_order() -> None:
    requests = [DecodeRequest.from_http(
        [("shape", "1"), ("dtype", "float32")], {}, np.float32([number]).tobytes()) for number in range(3 * IN_FLIGHT)
    ]  # fmt: skip
    for send in (Memory.send, lambda memory, batch: asyncio.run(memory.send_async(batch))):
        memory = Memory()
        results = send(memory, requests)
        assert [float(to_torch(result.tensor)) for result in results] == list(range(3 * IN_FLIGHT))
        assert memory.most == IN_FLIGHT


@pytest.mark.parametrize(
    "transport", [Memory(), HttpTransport("http://127.0.0.1:1/model")], ids=lambda t: type(t).__name__
)
def test_a_reference_needs_a_handle(transport: Transport) -> None:
    with RemoteVAE(transport) as vae, pytest.raises(BadRequest, match=r"as_ref.*handle") as caught:
        vae.decode(Z, as_ref=True)
    assert caught.value.parameter == "as_ref"


def test_a_batch_of_images_has_no_one_reference() -> None:
    with RemoteVAE(Memory()) as vae, pytest.raises(BadRequest, match=r"as_ref.*one by one"):
        vae.decode(torch.zeros(2, 4, 2, 2), as_ref=True)


def test_a_wrong_argument_sends_nothing() -> None:
    with ScriptedServer(echo) as server, RemoteVAE(server.url) as vae:
        with pytest.raises(BadRequest):
            vae.decode(Z, scaling_factor=0.0)
        assert server.connections == 0


def test_the_json_of_base64_is_what_the_first_server_took() -> None:
    def answer(exchange: Exchange) -> None:
        said.append((exchange.headers["content-type"], json.loads(exchange.said)))
        echo(exchange)

    said: list[Any] = []
    with ScriptedServer(answer) as server:
        remote_decode(server.url, Z + 1, output_type="pt", input_tensor_type="base64")
    assert said == [("tensor/base64", {"inputs": base64.b64encode((Z + 1).numpy().tobytes()).decode()})]


def test_a_fork_never_gets_the_answers_of_its_parent() -> None:
    """DataLoader workers fork: a connection that two processes read from would swap their pictures."""
    with ScriptedServer(echo) as server, RemoteVAE(server.url, workers=1) as vae:

        def all_mine(value: float) -> bool:
            z = torch.full((1, 4, 2, 2), value)
            futures = [vae.submit(z, output_type="pt") for _ in range(20)]
            return all(torch.equal(future.result(30), z) for future in futures)

        assert all_mine(0.0)
        child = os.fork()
        if child == 0:
            os._exit(0 if all_mine(1.0) else 1)
        assert all_mine(2.0)
        assert os.waitpid(child, 0)[1] == 0


def test_no_error_shows_the_token_that_stands_in_the_endpoint() -> None:
    for answer in (None, lambda exchange: exchange.reply(200, ENDINGS, b"", 100)):
        server = ScriptedServer(answer) if answer else None
        with server or contextlib.nullcontext():
            address = server.url if server else "http://127.0.0.1:1/model"
            with pytest.raises(RemoteVAEError) as caught:
                remote_decode(address.replace("http://", "http://:s3cret@"), Z, timeout=3, retries=0)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("timeout", [(5, None), (None, 5), (1, 2), 3, None])
def test_a_timeout_may_have_no_end(timeout: Any) -> None:
    with ScriptedServer(echo) as server:
        assert torch.equal(remote_decode(server.url, Z, output_type="pt", timeout=timeout), Z)


@pytest.mark.parametrize("timeout", [0, -1, "3", (1, 0), (1, 2, "x"), True])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(BadRequest, match="timeout"):
        RemoteVAE("http://127.0.0.1:1/model", timeout=timeout)
