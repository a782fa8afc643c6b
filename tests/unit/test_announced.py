"""Large bodies that are announced by their query: what can be told without a byte of them is said before they are read."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
from PIL import Image

from limits import WAIT_S
from raw_http import Answer, exchange
from remote_vae.errors import BadRequest, InternalError, ModelFailed, Overloaded, RemoteVAEError, TimedOut
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.request import LARGE, announced_from_plain, announced_to_plain, read_announced
from remote_vae.protocol.tensors import RawTensor, announced
from remote_vae.protocol.wire import PROTOCOL
from remote_vae_serve.admission import Admission
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.http.app import create_model_app
from remote_vae_serve.ingress.ingress import Ingress
from remote_vae_serve.replica import announcements
from remote_vae_serve.replica.replica import SingleModel
from served import served
from sick import Replica, engine, job, kill, make, sick

__all__ = ["engine", "make", "sick"]  # fixtures

SHAPE = (1, 4, 512, 512)
BYTES = 4 * 4 * 512 * 512
QUERY = {"shape": SHAPE, "dtype": "float32", "output_type": "pt"}


@pytest.fixture
def url(sick: Replica) -> Iterator[str]:
    with served(create_model_app("model", SingleModel(sick.vae), 2**26, WAIT_S)) as url:
        yield url


def head(path: str = "/", length: int = BYTES, headers: dict[str, str] | None = None, **query: Any) -> bytes:
    lines = {"host": "x", "content-type": "tensor/binary", **(headers or {}), "content-length": str(length)}
    asked = urlencode(QUERY | query, doseq=True)
    return f"POST {path}?{asked} HTTP/1.1\r\n{''.join(f'{n}: {v}' + chr(13) + chr(10) for n, v in lines.items())}\r\n".encode()


def assert_refused(answer: Answer, status: int, words: str, parameter: str | None = None) -> None:
    fields = answer.fields or {}
    assert (answer.status, fields.get("parameter")) == (status, parameter)
    assert words in fields["error"]


@pytest.mark.parametrize(
    ("change", "parameter", "words"),
    [
        ({"dtype": "float99"}, "dtype", "float99"),
        ({"shape": (1, 7, 512, 512)}, "shape", "The body has 4194304 bytes"),
        ({"shape": (1, 16, 256, 256)}, "shape", "do not fit"),
        ({"output_type": "mp4"}, "output_type", "make images"),
        ({"path": "/encode"}, "shape", "expected 3 channels"),
        (
            {"path": "/encode", "shape": (3, 515, 1000), "length": 4 * 3 * 515 * 1000},
            "shape",
            "takes multiples of 8",
        ),
    ],
)
def test_what_a_query_tells_is_said_before_the_body_is_read(
    url: str, change: dict[str, Any], parameter: str, words: str
) -> None:
    assert_refused(exchange(url, head(**change), timeout_s=WAIT_S), 400, words, parameter)


def test_what_does_not_fit_into_memory_is_refused_before_the_body_is_read(
    sick: Replica, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []

    def plan(shape: tuple[int, ...], *_: Any) -> None:
        planned.append(shape)
        raise BadRequest("Too large for this device", parameter="shape")

    monkeypatch.setattr(announcements, "REST", 0.0)
    monkeypatch.setattr(sick.pipeline._engine, "plan_decode", plan)
    monkeypatch.setattr(sick.pipeline._engine, "plan_encode", plan)
    assert_refused(exchange(url, head(), timeout_s=WAIT_S), 400, "Too large", "shape")
    pixels = head("/encode", 4 * 3 * 512 * 1024, shape=(3, 512, 1024))
    assert_refused(exchange(url, pixels, timeout_s=WAIT_S), 400, "Too large", "shape")
    pictures = head("/encode", 2 * 3 * 517 * 1029, shape=(2, 517, 1029, 3), dtype="uint8")
    assert_refused(exchange(url, pictures, timeout_s=WAIT_S), 400, "Too large", "shape")
    assert planned == [SHAPE, (1, 3, 512, 1024), (2, 3, 512, 1024)]


@pytest.mark.parametrize(("deadline", "status"), [("5000", 503), ("13000", 200), (None, 200)])
def test_who_would_not_wait_for_its_turn_is_told_so_before_the_body_is_read(
    sick: Replica, url: str, monkeypatch: pytest.MonkeyPatch, deadline: str | None, status: int
) -> None:
    monkeypatch.setattr(sick.pipeline._worker, "least_wait_s", {"127.0.0.1": 12.0}.__getitem__)
    request = head(headers={"x-vae-deadline-ms": deadline} if deadline else {}, output_type="pil")
    answer = exchange(url, request, *([bytes(BYTES)] if status == 200 else []), timeout_s=WAIT_S)
    assert answer.status == status
    if status == 503:
        assert_refused(answer, 503, "The queue of model is 12.0 s long, and the client waits 5.0 s")
        assert answer.headers["retry-after"] in ("7", "8")


def test_who_has_its_share_is_refused_before_its_body_is_read(sick: Replica, url: str) -> None:
    sick.vae._config = VAEConfig(source="x", max_requests=2)
    with sick.vae.place("127.0.0.1"):
        assert_refused(exchange(url, head(), timeout_s=WAIT_S), 503, "queue of model is full")
        assert_refused(exchange(url, head(length=100), timeout_s=WAIT_S), 503, "queue of model is full")


def test_what_is_let_in_is_answered_as_ever(url: str) -> None:
    answer = exchange(url, head(output_type="pil"), bytes(BYTES), timeout_s=WAIT_S)
    assert (answer.status, Image.open(io.BytesIO(answer.body)).size) == (200, (4096, 4096))


@pytest.mark.parametrize(
    ("query", "content_type", "nbytes"),
    [
        ([("shape", "1")], "", LARGE),
        ([("shape", "1")], "", 0),
        ([("dtype", "uint8")], "", LARGE + 1),
        ([("shape", "1")], "application/json", LARGE + 1),
        ([("shape", "1")], "tensor/base64", LARGE + 1),
        ([("shape", "1")], "text/html", LARGE + 1),
    ],
    ids=["small", "no length", "no shape", "JSON", "base64", "unknown"],
)
def test_of_what_is_small_or_tells_too_little_nobody_is_asked(
    query: list[tuple[str, str]], content_type: str, nbytes: int
) -> None:
    assert read_announced(None, query, {"content-type": content_type}, nbytes) is None


def test_a_body_over_the_limit_is_told_so_before_its_shape_is_looked_at(url: str) -> None:
    for length in (2**26 + 1, 10**19 + 5):
        assert_refused(exchange(url, head(length=length), timeout_s=WAIT_S), 413, "over the server's limit", "body")


def test_a_device_that_is_dead_is_no_queue(sick: Replica, url: str) -> None:
    kill(sick.pipeline._worker._thread)
    sick.pipeline._worker.submit(job())
    sick.pipeline._worker._thread.join(WAIT_S)
    answer = exchange(url, head(headers={"x-vae-deadline-ms": "5000"}), timeout_s=WAIT_S)
    assert_refused(answer, 503, "is being replaced")


def test_large_shapes_are_forecast_one_at_a_time_and_then_not_for_a_while(
    sick: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Announcing costs nothing, forecasting seconds: what comes meanwhile is let in unforecast."""
    forecast, gate = [], threading.Event()

    def plan(shape: tuple[int, ...], *_: Any) -> None:
        forecast.append(shape)
        assert gate.wait(WAIT_S)
        time.sleep(0.05)

    monkeypatch.setattr(sick.pipeline._engine, "plan_decode", plan)

    async def ask() -> None:
        first = asyncio.ensure_future(sick.pipeline.announce(of_rows(512)))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(sick.pipeline.announce(of_rows(513)), WAIT_S)
        gate.set()
        await first
        await asyncio.wait_for(sick.pipeline.announce(of_rows(514)), WAIT_S)
        monkeypatch.setattr(announcements, "REST", 0.0)
        sick.pipeline._announcements._rests_until = 0.0
        await sick.pipeline.announce(of_rows(515))

    asyncio.run(ask())
    assert [shape[-2] for shape in forecast] == [512, 515]
    with pytest.raises(BadRequest):  # what costs nothing is looked at always
        asyncio.run(sick.pipeline.announce(DecodeRequest(RawTensor(announced(4 * 7 * 64), "float32", (1, 7, 8, 8)))))


def of_rows(rows: int) -> DecodeRequest:
    return DecodeRequest(RawTensor(announced(4 * 4 * 512 * rows), "float32", (1, 4, rows, 512)))


@pytest.mark.parametrize(
    "request_",
    [
        DecodeRequest(RawTensor(announced(BYTES), "float32", SHAPE), client="c", deadline_s=3.0),
        EncodeRequest(RawTensor(announced(BYTES), "float32", (1, 1, 1024, 1024)), seed=7),
    ],
)
def test_an_announcement_crosses_a_handle_with_the_number_of_its_bytes(request_: Any) -> None:
    plain = announced_to_plain(request_)
    assert plain[1] == BYTES
    again = announced_from_plain(request_.verb, plain)
    assert announced_to_plain(again) == plain
    assert type(again) is type(request_)


@pytest.mark.parametrize("count", [-1, 10**30, 10**15, "9", None, [1]])
def test_an_announcement_of_no_number_of_bytes_is_refused(count: Any) -> None:
    plain = announced_to_plain(DecodeRequest(RawTensor(announced(BYTES), "float32", SHAPE)))
    with pytest.raises(BadRequest):
        announced_from_plain("decode", (plain[0], count, *plain[2:]))


@pytest.mark.parametrize(
    ("verb", "plain"),
    [
        ("decode", (PROTOCOL,)),
        ("draw", announced_to_plain(DecodeRequest(RawTensor(announced(BYTES), "float32", SHAPE)))),
        ("encode", announced_to_plain(EncodeRequest(announced(BYTES)))),
        ("encode", announced_to_plain(DecodeRequest(RawTensor(announced(BYTES), "float32", SHAPE)))),
    ],
    ids=["too short", "unknown verb", "a picture's file", "another request"],
)
def test_a_malformed_announcement_is_refused_in_words(verb: str, plain: tuple[Any, ...]) -> None:
    with pytest.raises(BadRequest):
        announced_from_plain(verb, plain)


def test_a_replica_says_by_handle_when_the_turn_would_come(sick: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sick.pipeline._worker, "least_wait_s", {"job 1": 4.5}.__getitem__)
    plain = announced_to_plain(DecodeRequest(RawTensor(announced(BYTES), "float32", SHAPE), client="job 1"))
    assert asyncio.run(sick.vae.announce("decode", plain)) == 4.5


class Told:
    """A replica's answer to an announcement."""

    def __init__(self, answer: float | RemoteVAEError) -> None:
        self._answer = answer
        self.asked = 0

    async def announce_async(self, request: Any) -> float:
        self.asked += 1
        if isinstance(self._answer, float):
            return self._answer
        raise self._answer


@pytest.fixture
def ask() -> Callable[..., None]:
    """What the ingress makes of it, with so many replicas."""

    def ask(transport: Told, replicas: int, mistake: str = "") -> None:
        ingress: Any = object.__new__(Ingress)
        running = frozenset(map(str, range(replicas)))
        ingress._registry = SimpleNamespace(get=lambda name: SimpleNamespace(running=running, mistake=mistake))
        request = DecodeRequest(RawTensor(announced(BYTES), "float32", SHAPE), deadline_s=5.0)
        asyncio.run(ingress._announce(transport, "sd", Admission("sd"), request))

    return ask


def test_the_ingress_refuses_what_the_only_replica_would_be_late_for(ask: Callable[..., None]) -> None:
    with pytest.raises(Overloaded, match=r"queue of sd is 9\.0 s long") as raised:
        ask(Told(9.0), 1)
    assert raised.value.retry_after == 4.0
    ask(Told(4.0), 1)


def test_of_several_replicas_another_may_be_free(ask: Callable[..., None]) -> None:
    ask(Told(9.0), 2)
    ask(Told(9.0), 1, mistake="its deploy failed, and of the replicas before it is only known that one answers")


def test_no_replica_is_started_to_be_asked(ask: Callable[..., None]) -> None:
    told = Told(9.0)
    ask(told, 0)
    assert told.asked == 0


@pytest.mark.parametrize("error", [BadRequest("no", parameter="shape"), ModelFailed("no")])
def test_a_refusal_of_the_replica_is_passed_on(ask: Callable[..., None], error: RemoteVAEError) -> None:
    with pytest.raises(type(error)):
        ask(Told(error), 2)


@pytest.mark.parametrize(
    "error",
    [
        TimedOut("silent"),
        InternalError("a replica of before, which has no such method"),
        Overloaded("Serve's router is full"),
    ],
)
def test_a_replica_that_cannot_say_leaves_it_to_the_request(ask: Callable[..., None], error: RemoteVAEError) -> None:
    ask(Told(error), 1)
