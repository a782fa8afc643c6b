"""The HTTP app in this process: routes, limits, and the one form in which everything that goes wrong is answered."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from in_process import InProcess, fake_engine, pipeline_of
from remote_vae import errors
from remote_vae.errors import RemoteVAEError
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae_serve.http.app import RESERVED, create_app
from samples import latents

MAX_BODY = 1 << 16
DEADLINE_S = 5.0
Z = latents(1, 4, 4, 6)
QUERY, HEADERS, BODY = DecodeRequest(from_array(Z), output=Output.PNG).to_http()
DECODES = ["/fake", "/fake/", "/fake/decode", "/fake/decode/"]
READS = ["/fake", "/fake/", "/models", "/models/", "/health", "/health/"]


class Failing:
    """Decodes nothing: raises what it is told to."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def __call__(self, request: DecodeRequest) -> Result:
        raise self.error


def app_of(deadline_s: float = DEADLINE_S, **decoders: Any) -> TestClient:
    return TestClient(create_app(InProcess(**decoders), MAX_BODY, deadline_s), follow_redirects=False)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    pipeline = pipeline_of(fake_engine(), "fake")
    yield app_of(fake=pipeline.decode)
    pipeline.close()


def post(client: TestClient, path: str = "/fake", **changes: Any) -> Any:
    arguments: dict[str, Any] = {"params": QUERY, "headers": HEADERS, "content": bytes(BODY)} | changes
    return client.post(path, **arguments)


def assert_error(answer: Any, status: int, code: str) -> dict[str, Any]:
    """The contract's JSON, whatever went wrong."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    fields = dict(answer.json())
    assert fields["code"] == code
    assert isinstance(fields["error"], str)
    assert fields["error"]
    assert fields["request_id"] == answer.headers["x-request-id"]
    return fields


@pytest.mark.parametrize("path", DECODES)
def test_every_spelling_decodes_and_none_redirects(client: TestClient, path: str) -> None:
    """A redirect makes the client send its body twice, or not at all."""
    answer = post(client, path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (48, 32)


@pytest.mark.parametrize("path", READS)
def test_every_reading_route_answers_with_json_and_none_redirects(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert isinstance(answer.json(), dict)
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_the_models_are_listed_as_they_describe_themselves(client: TestClient) -> None:
    assert client.get("/models").json() == {"models": [{"name": "fake", "state": "ready"}]}
    assert client.get("/fake").json() == {"name": "fake", "state": "ready"}


def test_an_answer_says_which_model_made_it_and_how(client: TestClient) -> None:
    headers = post(client).headers
    assert (headers["x-vae-model"], headers["x-vae-dtype"]) == ("fake", "float32")
    assert "x-vae-revision" in headers
    assert re.fullmatch(r"queue;dur=\d+\.\d\d, decode;dur=\d+\.\d\d, encode;dur=\d+\.\d\d", headers["server-timing"])
    assert headers["x-request-id"]


@pytest.mark.parametrize("reply", ["binary", "base64"])
def test_a_tensor_comes_back_as_it_was_asked_for(client: TestClient, reply: Any) -> None:
    query, headers, body = DecodeRequest(from_array(Z), output=Output.PT, reply=reply).to_http()
    answer = post(client, params=query, headers=headers, content=bytes(body))
    assert answer.headers["content-type"] == f"tensor/{reply}"
    expected = fake_engine().decode(Z).pixels
    assert torch.equal(to_torch(Result.from_http(answer.headers, answer.content).tensor), expected)


def test_the_body_is_read_whole_however_it_is_cut(client: TestClient) -> None:
    def in_pieces() -> Iterator[bytes]:
        for start in range(0, len(BODY), 7):
            yield bytes(BODY)[start : start + 7]

    assert post(client, content=in_pieces()).content == post(client).content


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nobody", 404, "unknown_model"),
        ("GET", "/nobody/", 404, "unknown_model"),
        ("POST", "/nobody", 404, "unknown_model"),
        ("POST", "/nobody/decode", 404, "unknown_model"),
        ("GET", "/", 404, "unknown_route"),
        ("POST", "/", 404, "unknown_route"),
        ("POST", "/fake/decode/more", 404, "unknown_route"),
        ("POST", "/fake/unheard-of", 404, "unknown_route"),
        ("PUT", "/fake", 405, "wrong_method"),
        ("DELETE", "/fake/", 405, "wrong_method"),
        ("PATCH", "/fake/decode", 405, "wrong_method"),
        ("GET", "/fake/decode", 405, "wrong_method"),
        ("POST", "/models", 405, "wrong_method"),
        ("POST", "/health/", 405, "wrong_method"),
    ],
)
def test_what_is_not_there_is_said_in_json(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    assert_error(client.request(method, path), status, code)


def test_an_unknown_model_names_those_that_are_served(client: TestClient) -> None:
    fields = assert_error(post(client, "/nobody"), 404, "unknown_model")
    assert "fake" in fields["error"]
    assert fields["parameter"] == "model"


def test_a_bad_request_names_the_parameter(client: TestClient) -> None:
    fields = assert_error(post(client, params=[*QUERY, ("fps", "fast")]), 400, "bad_request")
    assert fields["parameter"] == "fps"
    assert "fps" in fields["error"]


def test_an_unknown_content_type_is_a_415(client: TestClient) -> None:
    fields = assert_error(post(client, headers={"content-type": "text/html"}), 415, "unknown_content_type")
    assert "text/html" in fields["error"]


@pytest.mark.parametrize("kind", errors.SENT)
def test_an_error_of_a_model_is_answered_as_what_it_is(kind: type[RemoteVAEError]) -> None:
    failing = Failing(kind("Do this.", parameter="shape", retry_after=2.5))
    answer = post(app_of(fake=failing))
    fields = assert_error(answer, kind.status, kind.code)
    assert (fields["error"], fields["parameter"]) == ("Do this.", "shape")
    assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    "error", [RuntimeError("/root/secret.safetensors"), KeyError("secret"), MemoryError("secret"), OSError(5, "secret")]
)
def test_internals_stay_in_the_log(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "ray.serve"):
        answer = post(app_of(fake=Failing(error)))
    fields = assert_error(answer, 500, "internal_error")
    assert "secret" not in answer.text + str(answer.headers)
    assert type(error).__name__ not in answer.text
    assert fields["request_id"] in caplog.text
    assert "secret" in caplog.text


def test_a_decode_past_the_deadline_is_a_504_and_is_given_up() -> None:
    given_up = []

    async def forever(request: DecodeRequest) -> Result:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            given_up.append(True)
            raise
        raise AssertionError

    fields = assert_error(post(app_of(deadline_s=0.05, fake=forever)), 504, "deadline_exceeded")
    assert "0.05 s" in fields["error"]
    assert given_up == [True]


def test_a_time_out_of_the_model_itself_is_a_504_too() -> None:
    assert_error(post(app_of(fake=Failing(errors.TimedOut("late")))), 504, "deadline_exceeded")


def test_the_id_that_a_client_sent_is_the_id_of_the_error(client: TestClient) -> None:
    answer = client.post("/nobody", headers={"x-request-id": "my-id.1"})
    assert answer.json()["request_id"] == "my-id.1"


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, '{"a": 1}', "<script>"])
def test_an_id_that_is_none_is_replaced(client: TestClient, sent: str) -> None:
    answer = client.post("/nobody", headers={"x-request-id": sent})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.json()["request_id"])


def test_requests_have_different_ids(client: TestClient) -> None:
    assert len({post(client).headers["x-request-id"] for _ in range(3)}) == 3


async def raw_post(
    path: str, receive: Callable[[], Any], headers: dict[str, str], app: Any, query: bytes = b""
) -> tuple[int, dict[str, Any]]:
    """The app called as a server calls it: the test sees how much of the body is asked for."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http",
        "query_string": query, "http_version": "1.1", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body) if body else {}


async def nobody_asks() -> Any:
    raise AssertionError("the body was read")


def endless(chunk: int) -> tuple[Callable[[], Any], list[int]]:
    """A body that never ends, and the sizes of what was taken of it."""
    taken: list[int] = []

    async def receive() -> dict[str, Any]:
        taken.append(chunk)
        return {"type": "http.request", "body": b"x" * chunk, "more_body": True}

    return receive, taken


BARE = create_app(InProcess(fake=Failing(AssertionError("decoded"))), MAX_BODY, DEADLINE_S)


@pytest.mark.parametrize("announced", [str(MAX_BODY + 1), "9" * 30])
def test_an_announced_body_over_the_limit_is_refused_unread(announced: str) -> None:
    status, fields = asyncio.run(raw_post("/fake", nobody_asks, {"content-length": announced}, BARE))
    assert (status, fields["code"], fields["parameter"]) == (413, "body_too_large", "body")
    assert str(MAX_BODY) in fields["error"]


@pytest.mark.parametrize("headers", [{}, {"transfer-encoding": "chunked"}, {"content-length": "10"}], ids=str)
def test_a_body_that_grows_over_the_limit_is_read_no_further(headers: dict[str, str]) -> None:
    receive, taken = endless(MAX_BODY // 4)
    status, fields = asyncio.run(raw_post("/fake", receive, headers, BARE))
    assert (status, fields["code"]) == (413, "body_too_large")
    assert len(taken) == 5


def test_a_body_of_exactly_the_limit_is_read() -> None:
    z = torch.zeros(1, 4, 64, 64)
    assert z.nbytes == MAX_BODY
    query, headers, body = DecodeRequest(from_array(z), output=Output.PNG).to_http()
    pipeline = pipeline_of(fake_engine())
    answer = post(app_of(fake=pipeline.decode), params=query, headers=headers, content=bytes(body))
    pipeline.close()
    assert answer.status_code == 200
    assert not np.asarray(Image.open(io.BytesIO(answer.content))).std()


def test_the_body_of_a_request_for_an_unknown_model_is_not_read() -> None:
    status, fields = asyncio.run(raw_post("/nobody", nobody_asks, {}, BARE))
    assert (status, fields["code"]) == (404, "unknown_model")


def test_a_client_that_leaves_in_its_body_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    status, _ = asyncio.run(raw_post("/fake", leave, {"content-length": "100"}, BARE))
    assert status == 499
    assert not caplog.records


def test_requests_go_side_by_side() -> None:
    """Each waits until all have come: one after the other they would wait for ever."""

    async def run() -> list[int]:
        everyone = asyncio.Event()
        waiting = 0

        async def meet(request: DecodeRequest) -> Result:
            nonlocal waiting
            waiting += 1
            if waiting == 3:
                everyone.set()
            await everyone.wait()
            return Result("image/png", np.zeros(1, np.uint8))

        async def body() -> AsyncIterator[dict[str, Any]]:
            yield {"type": "http.request", "body": BODY, "more_body": False}

        app = create_app(InProcess(fake=meet), MAX_BODY, DEADLINE_S)
        query = "&".join(f"{name}={value}" for name, value in QUERY).encode()

        async def one() -> int:
            statuses: list[int] = []

            async def send(message: Any) -> None:
                statuses.extend([message["status"]] if "status" in message else [])

            headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            scope = {"type": "http", "method": "POST", "path": "/fake", "query_string": query, "headers": headers}
            await app(scope, body().__anext__, send)
            return statuses[0]

        return list(await asyncio.gather(one(), one(), one()))

    assert asyncio.run(run()) == [200, 200, 200]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [("/fake", 400, "bad_request"), ("/nobody", 404, "unknown_model"), ("/fake/nothing", 404, "unknown_route")],
)
def test_a_query_that_is_no_utf8_is_the_clients_fault(
    path: str, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """uvicorn lets it through where it parses by httptools, as Serve has it."""
    app = create_app(InProcess(fake=pipeline_of(fake_engine(), "fake").answer), MAX_BODY, DEADLINE_S)

    async def empty() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    answered, fields = asyncio.run(raw_post(path, empty, {}, app, b"\xff\xfe=1"))
    assert (answered, fields["code"]) == (status, code)
    assert not caplog.records


def test_the_reserved_names_are_the_apps_own_paths() -> None:
    """A model of such a name could not be reached."""
    shadowed = InProcess(**{name: Failing(AssertionError("decoded")) for name in RESERVED})
    client = TestClient(create_app(shadowed, MAX_BODY, DEADLINE_S))
    for path in ("/health", "/models"):
        assert "state" not in client.get(path).json()
        assert path[1:] in RESERVED
