"""The proxy's middleware around toy apps that behave as Serve's proxy does, driven message by message and by a client."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxied import LIMIT, TOKENS, Echo, assert_json_error, error_of, exchange, wrap
from remote_vae_serve.middleware import settings
from remote_vae_serve.middleware.settings import Settings
from remote_vae_serve.middleware.size_limit import SizeLimit
from remote_vae_serve.proxy import middlewares

__all__ = ["wrap"]  # a fixture


def test_an_announced_body_over_the_limit_is_refused_before_any_of_it_is_read() -> None:
    for announced in (str(LIMIT + 1), "9" * 5000):
        echo = Echo()
        sent, taken = exchange(
            SizeLimit(echo, Settings(LIMIT, linger_idle_s=0.05)), [],
            {"content-length": announced, "x-request-id": "mine"}, idle=True,
        )  # fmt: skip
        status, fields = error_of(sent)
        assert (status, fields["code"], fields["parameter"]) == (413, "body_too_large", "body")
        assert fields["request_id"] == "mine"
        assert (echo.calls, taken) == (0, 0)
        assert (b"connection", b"close") in sent[0]["headers"]


def test_what_still_comes_of_a_refused_body_is_dropped_so_that_the_answer_arrives(wrap: Any) -> None:
    echo = Echo()
    sent, taken = exchange(wrap(echo), [bytes(LIMIT)] * 50, {"content-length": str(50 * LIMIT)})
    assert (error_of(sent)[0], echo.calls, taken) == (413, 0, 50)
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False]


def test_dropping_ends_though_the_body_does_not() -> None:
    def endless() -> Iterable[bytes]:
        while True:
            yield b"x"

    limit = SizeLimit(Echo(), Settings(LIMIT, linger_s=0.05))
    sent, _ = exchange(limit, endless(), {"content-length": str(LIMIT + 1)})
    assert error_of(sent)[0] == 413


def test_a_chunked_body_is_cut_off_at_the_limit(wrap: Any) -> None:
    echo = Echo()
    sent, _ = exchange(wrap(echo), [bytes(400)] * 10, {"transfer-encoding": "chunked"})
    assert error_of(sent)[1]["code"] == "body_too_large"
    assert (echo.read, echo.disconnected) == (800, True)


def test_an_app_that_cancels_or_complains_when_it_is_cut_off_changes_nothing(wrap: Any) -> None:
    """As a replica does that answers HTTP itself."""

    async def direct(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await PlainTextResponse("the client is gone", 499)(scope, receive, send)
        raise asyncio.CancelledError

    sent, _ = exchange(wrap(direct), [bytes(400)] * 10, {"transfer-encoding": "chunked"})
    assert error_of(sent)[0] == 413


def test_an_answer_that_has_begun_is_finished_though_the_body_gets_too_long(wrap: Any) -> None:
    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        read = 0
        while (message := await receive()).get("more_body"):
            read += len(message["body"])
        await send({"type": "http.response.body", "body": str(read).encode()})

    sent, _ = exchange(wrap(early), [bytes(400)] * 10, {"transfer-encoding": "chunked"})
    assert [message.get("body") for message in sent] == [None, b"800"]


def test_a_body_at_the_limit_passes(wrap: Any) -> None:
    for body in (bytes(LIMIT), iter([bytes(LIMIT // 2)] * 2)):
        assert TestClient(wrap(Echo())).post("/sd", content=body).json() == LIMIT


def _basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


GOOD = ["Bearer first", "bearer second", "Bearer  second ", _basic(":first"), _basic("anybody:second")]
BAD = [None, "", "first", "Bearer", "Bearer ", "Bearer firs", "Bearer first,second", "Bearer \xe9", _basic("first:"),
       _basic("first"), "Basic first", "Basic !!", "Digest first"]  # fmt: skip


@pytest.mark.parametrize("credentials", GOOD)
def test_any_of_the_tokens_lets_in(wrap: Any, credentials: str) -> None:
    client = TestClient(wrap(Echo(), TOKENS), headers={"authorization": credentials})
    assert client.post("/sd", content=b"abc").json() == 3


@pytest.mark.parametrize("credentials", BAD)
def test_nothing_else_does(wrap: Any, credentials: str | None) -> None:
    echo = Echo()
    headers = {} if credentials is None else {"authorization": credentials.encode("latin-1")}
    for answer in (TestClient(wrap(echo, TOKENS)).post("/sd", content=b"abc", headers=headers),
                   TestClient(wrap(echo, TOKENS)).get("/models", headers=headers)):  # fmt: skip
        fields = assert_json_error(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "first" not in fields["error"]
    assert echo.calls == 0


def test_health_needs_no_token_and_a_post_to_it_does(wrap: Any) -> None:
    client = TestClient(wrap(Echo(), TOKENS))
    for path in ("/health", "/health/", "/-/healthz"):
        assert client.get(path).status_code == 200
        assert client.post(path).status_code == 401
    assert client.get("/health/x").status_code == 401
    assert client.get("/-/routes").status_code == 401


def test_a_stranger_is_told_nothing_of_the_limit(wrap: Any) -> None:
    sent, _ = exchange(wrap(Echo(), TOKENS), [bytes(LIMIT + 1)], {"content-length": str(LIMIT + 1)})
    assert error_of(sent)[0] == 401


def test_a_websocket_needs_a_token_too(wrap: Any) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    asyncio.run(wrap(Echo(), TOKENS)({"type": "websocket", "path": "/sd", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def handshake(app: ASGIApp) -> list[Message]:
    """What is said to a WebSocket by a server that lets handshakes be refused in words, as uvicorn does."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    headers = [(b"content-length", b"3"), (b"x-request-id", b"mine")]
    extensions = {"websocket.http.response": {}}
    scope = {"type": "websocket", "path": "/sd", "headers": headers, "extensions": extensions}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent


def test_a_websocket_is_turned_away_with_a_sentence_where_the_server_can(wrap: Any) -> None:
    async def closes(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 1000})

    for tokens, told, code in ((None, 405, "wrong_method"), (TOKENS, 401, "unauthorized")):
        sent = handshake(wrap(closes, tokens))
        assert [message["type"] for message in sent] == [
            "websocket.http.response.start",
            "websocket.http.response.body",
        ]
        status, fields = error_of(sent)
        assert (status, fields["code"], fields["request_id"]) == (told, code, "mine")


def test_a_websocket_that_is_accepted_is_left_alone(wrap: Any) -> None:
    said = [{"type": "websocket.accept"}, {"type": "websocket.send", "text": "hello"}, {"type": "websocket.close"}]

    async def accepts(scope: Scope, receive: Receive, send: Send) -> None:
        for message in said:
            await send(message)

    assert handshake(wrap(accepts)) == said


TEXTS = [
    (404, "Path '/x' not found. Ping http://.../-/routes for available routes.", 404, "unknown_route", "2"),
    (408, "Request 1 timed out after 3s.", 504, "deadline_exceeded", None),
    (429, "Request dropped due to backpressure", 503, "overloaded", "2"),
    (503, "Request dropped due to backpressure", 503, "overloaded", "2"),
    (503, "Deployment 'Ingress' is unavailable", 503, "unavailable", "2"),
    (500, "Traceback: secret.py, line 3", 500, "internal_error", None),
]


@pytest.mark.parametrize(("status", "text", "told", "code", "retry_after"), TEXTS)
def test_serves_own_texts_become_the_contracts_json(
    wrap: Any, status: int, text: str, told: int, code: str, retry_after: str | None
) -> None:
    client = TestClient(wrap(PlainTextResponse(text, status, {"x-request-id": "serves-own"})))
    answer = client.post("/sd")
    fields = assert_json_error(answer, told, code)
    assert fields["request_id"] == "serves-own"
    assert answer.headers.get("retry-after") == retry_after
    assert text not in answer.text


def test_serves_own_retry_after_is_kept(wrap: Any) -> None:
    answer = TestClient(wrap(PlainTextResponse("backpressure", 503, {"retry-after": "7"}))).get("/sd")
    assert answer.headers["retry-after"] == "7"


def test_an_app_that_says_nothing_is_a_503_and_one_that_raises_a_500(
    wrap: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"] = [*scope["headers"], (b"x-request-id", b"numbered-by-serve")]  # as RequestIdMiddleware does

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret")

    silence = TestClient(wrap(silent)).post("/sd")
    assert assert_json_error(silence, 503, "unavailable")["request_id"] == "numbered-by-serve"
    crash = TestClient(wrap(broken)).post("/sd")
    assert "secret" not in assert_json_error(crash, 500, "internal_error")["error"]
    assert "secret" in caplog.text


def test_an_answer_that_breaks_off_stays_broken(wrap: Any) -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        exchange(wrap(half), [], {})


UNTOUCHED = [
    Response(b'{"code": "overloaded"}', 503, media_type="application/json"),
    PlainTextResponse("a text", 200),
    PlainTextResponse("no such thing, says an application", 405),
    Response(b"<html>", 500, media_type="text/html"),
    Response(b"\x00", 200, {"content-type": "tensor/binary", "shape": "[1]"}),
]


@pytest.mark.parametrize("response", UNTOUCHED, ids=lambda response: f"{response.status_code}-{response.media_type}")
def test_every_other_answer_passes_as_it_is(wrap: Any, response: Response) -> None:
    answer = TestClient(wrap(response)).post("/sd")
    assert (answer.status_code, answer.content) == (response.status_code, response.body)
    assert {name: answer.headers[name] for name in response.headers} == dict(response.headers)


def test_headers_that_are_no_utf8_do_not_reach_serve_which_fails_on_them(wrap: Any) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await Response("{}", media_type="application/json")(scope, receive, send)

    kept = [(b"host", b"x"), (b"user-agent", "Zo\u00eb".encode())]
    broken = [(b"x-request-id", b"\xff\xfe"), (b"x-\xe9", b"1"), (b"x-request-timeout-seconds", b"\xc3")]
    scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": [*kept, *broken]}

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(wrap(serve)(scope, receive, send))
    assert seen == kept
    assert sent[0]["status"] == 200


def test_serves_own_paths_keep_their_text(wrap: Any) -> None:
    answer = TestClient(wrap(PlainTextResponse("This node is being drained.", 503))).get("/-/healthz")
    assert (answer.status_code, answer.text) == (503, "This node is being drained.")


def test_a_stream_passes_message_by_message(wrap: Any) -> None:
    """The app waits for each piece to have been sent on: a layer that gathers them would never let it end."""
    pieces = [b"a" * 10, b"b" * LIMIT, b"c" * LIMIT]
    sent: list[Message] = []

    async def run() -> None:
        async def watched() -> Any:
            for number, piece in enumerate(pieces):
                assert len(sent) == 1 + number  # the start and the pieces before
                yield piece

        async def receive() -> Message:
            return await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/sd", "headers": [], "asgi": {"spec_version": "2.4"}}
        await wrap(StreamingResponse(watched(), media_type="video/mp4"))(scope, receive, send)

    asyncio.run(run())
    assert [message["body"] for message in sent[1:]] == [*pieces, b""]


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({settings.MAX_BODY_MIB: "many"}, settings.MAX_BODY_MIB),
        ({settings.MAX_BODY_MIB: "-1"}, settings.MAX_BODY_MIB),
        ({settings.MAX_BODY_MIB: "nan"}, settings.MAX_BODY_MIB),
        ({settings.MAX_BODY_MIB: "inf"}, settings.MAX_BODY_MIB),
        ({settings.TOKENS: ""}, settings.TOKENS),
        ({settings.TOKENS: " , "}, settings.TOKENS),
        ({settings.TOKENS: "s3cret\u2603"}, settings.TOKENS),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_without_telling_a_token(
    environment: dict[str, str], name: str
) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        Settings.of(environment)
    assert "s3cret" not in str(caught.value)


def test_no_token_shows_where_serve_logs_its_options(wrap: Any) -> None:
    wrap(Echo(), "s3cret")
    assert "s3cret" not in repr(middlewares())
    assert Settings.of({settings.TOKENS: " s3cret ,other"}).tokens == ("s3cret", "other")


def test_it_imports_neither_ray_nor_torch() -> None:
    code = "import sys, remote_vae_serve.proxy; print(sorted({'ray', 'torch', 'diffusers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
