"""CORS and foreign pages: in front of toy apps as Serve's proxy has it, and around the apps of ingress and replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from in_process import InProcess, fake_engine, pipeline_of
from proxied import LIMIT, TOKENS, Echo, assert_json_error, wrap
from remote_vae_serve.allowed_origins import is_own, read_origins
from remote_vae_serve.config import IngressConfig, VAEConfig
from remote_vae_serve.http.app import create_app, create_model_app
from remote_vae_serve.middleware import settings
from remote_vae_serve.middleware.settings import Settings
from remote_vae_serve.proxy import guarded

__all__ = ["wrap"]  # a fixture

PAGE, OTHER = "https://page.example", "https://other.example"
FROM_PAGE = {"origin": PAGE}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
QUERY = {"shape": [1, 4, 4, 4], "dtype": "float32"}
BODY = bytes(1 * 4 * 4 * 4 * 4)


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says in the environment which origins are allowed."""
    return lambda origins: monkeypatch.setenv(settings.ALLOW_ORIGINS, origins)


def assert_readable(answer: Any, origin: str = PAGE) -> None:
    """A page of that origin is let read the answer, its headers included."""
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["access-control-expose-headers"] == "*"
    if origin != "*":
        assert answer.headers["vary"] == "Origin"


def assert_not_readable(answer: Any) -> None:
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_as_shipped_a_foreign_page_is_refused_before_its_body_is_read(wrap: Any) -> None:
    echo = Echo()
    client = TestClient(wrap(echo))
    for origin in (PAGE, "null", "http://testserver.example", "http://testserver:81", "", "https://" + 5000 * "x"):
        for answer in (client.post("/sd", content=b"abc", headers={"origin": origin}),
                       client.get("/models", headers={"origin": origin}),
                       client.options("/sd", headers={"origin": origin} | PREFLIGHT)):  # fmt: skip
            fields = assert_json_error(answer, 403, "forbidden")
            assert fields["parameter"] == "origin"
            assert repr(origin[:100]) in fields["error"]
            assert "allow_origins" in fields["error"]
            assert len(fields["error"]) < 400
            assert_not_readable(answer)
    assert echo.calls == 0


@pytest.mark.parametrize("headers", [{}, {"origin": "http://testserver"}, {"origin": "HTTPS://TestServer"}])
def test_who_is_no_page_and_the_servers_own_pages_pass_untouched(wrap: Any, headers: dict[str, str]) -> None:
    answer = TestClient(wrap(Echo())).post("/sd", content=b"abc", headers=headers)
    assert answer.json() == 3
    assert_not_readable(answer)


def test_an_allowed_page_is_answered_and_reads_every_header(wrap: Any, allow: Any) -> None:
    allow(f"{PAGE},http://localhost:3000")
    for origin in (PAGE, "http://localhost:3000"):
        answer = TestClient(wrap(Echo())).post("/sd", content=b"abc", headers={"origin": origin})
        assert answer.json() == 3
        assert_readable(answer, origin)
    refused = TestClient(wrap(Echo())).post("/sd", content=b"abc", headers={"origin": OTHER})
    assert_json_error(refused, 403, "forbidden")


def test_a_preflight_is_answered_before_a_token_is_asked_for(wrap: Any, allow: Any) -> None:
    allow(PAGE)
    echo = Echo()
    client = TestClient(wrap(echo, TOKENS))
    answer = client.options("/sd", headers=FROM_PAGE | PREFLIGHT | {"access-control-request-private-network": "true"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert "Origin" in answer.headers["vary"]
    assert echo.calls == 0


def test_a_preflight_for_what_no_page_may_send_is_json(wrap: Any, allow: Any) -> None:
    allow(PAGE)
    asked = FROM_PAGE | {"access-control-request-method": "FOO"}
    assert_json_error(TestClient(wrap(Echo())).options("/sd", headers=asked), 405, "wrong_method")


def test_an_options_that_is_no_preflight_goes_its_way(wrap: Any, allow: Any) -> None:
    allow(PAGE)
    assert TestClient(wrap(Echo())).options("/sd", headers=FROM_PAGE).json() == 0


def test_where_tokens_are_asked_for_the_token_decides(wrap: Any, allow: Any) -> None:
    allow(PAGE)
    client = TestClient(wrap(Echo(), TOKENS))
    answer = client.post("/sd", content=b"abc", headers={"origin": OTHER, "authorization": "Bearer first"})
    assert answer.json() == 3
    assert_not_readable(answer)
    for headers in ({"origin": OTHER}, {"origin": OTHER} | PREFLIGHT):
        answer = client.options("/sd", headers=headers)
        assert_json_error(answer, 401, "unauthorized")
        assert_not_readable(answer)


def test_an_allowed_page_reads_every_refusal(wrap: Any, allow: Any) -> None:
    allow(PAGE)

    async def silent(scope: Scope, receive: Receive, send: Send) -> None: ...

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError

    refusals = [
        (TestClient(wrap(Echo(), TOKENS)).post("/sd", headers=FROM_PAGE), 401, "unauthorized"),
        (TestClient(wrap(Echo())).post("/sd", headers=FROM_PAGE, content=bytes(LIMIT + 1)), 413, "body_too_large"),
        (TestClient(wrap(Echo())).post("/sd", headers=FROM_PAGE, content=iter([bytes(LIMIT)] * 2)), 413, "body_too_large"),
        (TestClient(wrap(silent)).post("/sd", headers=FROM_PAGE), 503, "unavailable"),
        (TestClient(wrap(broken)).post("/sd", headers=FROM_PAGE), 500, "internal_error"),
        (TestClient(wrap(PlainTextResponse("x", 404))).post("/sd", headers=FROM_PAGE), 404, "unknown_route"),
    ]  # fmt: skip
    for answer, status, code in refusals:
        assert_json_error(answer, status, code)
        assert_readable(answer)


def test_every_page_is_allowed_where_that_is_said(wrap: Any, allow: Any) -> None:
    allow("*")
    for origin in (PAGE, "null"):
        answer = TestClient(wrap(Echo())).post("/sd", content=b"abc", headers={"origin": origin})
        assert answer.json() == 3
        assert_readable(answer, "*")


def test_a_page_without_an_origin_of_its_own_is_allowed_by_name(wrap: Any, allow: Any) -> None:
    allow("null")
    assert_readable(TestClient(wrap(Echo())).get("/sd", headers={"origin": "null"}), "null")


def test_a_websocket_is_told_what_it_was_told_before(wrap: Any) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def closes(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 1000})

    scope = {"type": "websocket", "path": "/sd", "headers": [(b"origin", PAGE.encode())]}

    asyncio.run(wrap(closes)(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1000}]


@contextmanager
def door(
    kind: str, allow_origins: tuple[str, ...] = (), layers: Callable[[ASGIApp], ASGIApp] | None = None
) -> Iterator[Any]:
    """A client of the HTTP app of the ingress, or of a model's own, guarded as those are; and the path of the model."""
    models = InProcess(fake=pipeline_of(fake_engine(), "fake").answer)
    limits = (models, LIMIT, 10.0)
    app = guarded(create_app(*limits) if kind == "ingress" else create_model_app("fake", *limits), allow_origins)
    with TestClient(layers(app) if layers else app) as client:
        yield client, "/fake" if kind == "ingress" else "/"


@pytest.mark.parametrize("kind", ["ingress", "model"])
def test_without_a_proxy_of_ours_either_door_does_it_by_its_own_arguments(kind: str) -> None:
    with door(kind) as (client, path):
        assert client.post(path, params=QUERY, content=BODY).status_code == 200
        refused = client.post(path, params=QUERY, content=BODY, headers=FROM_PAGE)
        assert assert_json_error(refused, 403, "forbidden")["parameter"] == "origin"
    with door(kind, (PAGE,)) as (client, path):
        answer = client.post(path, params=QUERY | {"output_type": "pt"}, content=BODY, headers=FROM_PAGE)
        assert (answer.status_code, answer.headers["x-vae-model"]) == (200, "fake")
        assert_readable(answer)
        assert client.options(path, headers=FROM_PAGE | PREFLIGHT).status_code == 200
        wrong = client.post(path, params=QUERY, content=b"short", headers=FROM_PAGE)
        assert_json_error(wrong, 400, "bad_request")
        assert_readable(wrong)


@pytest.mark.parametrize("kind", ["ingress", "model"])
def test_behind_a_proxy_of_ours_either_door_leaves_it_to_that(wrap: Any, allow: Any, kind: str) -> None:
    allow(PAGE)
    with door(kind, (OTHER,), wrap) as (client, path):
        answer = client.post(path, params=QUERY, content=BODY, headers=FROM_PAGE)
        assert answer.status_code == 200
        assert answer.headers.get_list("access-control-allow-origin") == [PAGE]
        assert answer.headers.get_list("vary") == ["Origin"]
        assert_json_error(client.post(path, params=QUERY, content=BODY, headers={"origin": OTHER}), 403, "forbidden")


def test_the_environment_goes_before_the_arguments(allow: Any) -> None:
    allow("")
    with door("ingress", (PAGE,)) as (client, path):
        assert client.post(path, params=QUERY, content=BODY, headers=FROM_PAGE).status_code == 403


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://localhost:8000", "127.0.0.1:8000", False),
        ("http://localhost:8000", "localhost:8001", False),
        ("https://vae.example", "vae.example", True),
        ("https://vae.example", "VAE.example:443", True),
        ("http://vae.example", "vae.example:443", False),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://vae.example.evil.example", "vae.example", False),
        ("null", "", False),
        ("http://", "", False),
        ("", "", False),
    ],
)
def test_an_origin_is_the_servers_own_by_host_and_port(origin: str, host: str, own: bool) -> None:
    assert is_own(origin, host) is own


def test_origins_are_read_as_browsers_send_them() -> None:
    assert read_origins(["HTTPS://Page.example:443", "https://page.example ", "http://a:80", "null"]) == (
        PAGE, "http://a", "null",
    )  # fmt: skip
    assert read_origins(["http://[::1]:3000", "chrome-extension://abc"]) == (
        "http://[::1]:3000",
        "chrome-extension://abc",
    )
    assert Settings.of({settings.ALLOW_ORIGINS: f" {PAGE}, {OTHER},"}).allow_origins == (PAGE, OTHER)
    assert Settings.of({}).allow_origins is None
    assert IngressConfig(allow_origins="*").allow_origins == ("*",)  # type: ignore[arg-type]
    assert VAEConfig(source="demo", allow_origins=[PAGE]).allow_origins == (PAGE,)  # type: ignore[arg-type]


BAD = [
    "page.example",
    f"{PAGE}/",
    f"{PAGE}/x",
    f"{PAGE} {OTHER}",
    "https://",
    "//page.example",
    'https://a"b',
    "https://*.a",
    "https://a:b",
]


@pytest.mark.parametrize("origin", BAD)
def test_what_is_no_origin_is_refused_by_name(origin: str) -> None:
    with pytest.raises(
        ValueError, match=r"^REMOTE_VAE_ALLOW_ORIGINS: allow_origins has .*; expected .*https://page\.example"
    ):
        Settings.of({settings.ALLOW_ORIGINS: origin})
    with pytest.raises(ValidationError, match=r"allow_origins has .*; expected"):
        IngressConfig(allow_origins=[origin])  # type: ignore[arg-type]


@pytest.mark.parametrize("written", [PAGE, 3, [3], {PAGE: 1}, None])
def test_what_is_no_list_of_origins_is_refused_by_name(written: Any) -> None:
    with pytest.raises(ValidationError, match=r"allow_origins is .*; expected a list"):
        IngressConfig(allow_origins=written)


def test_all_and_some_at_once_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match=r"allow_origins has \* among others"):
        read_origins(["*", PAGE])
