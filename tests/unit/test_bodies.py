"""Request bodies: none outlives its request, all together keep to a budget, and none comes more slowly than others can wait.

The garbage collector rests while these run: what would wait for it is found.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from house import DOORS, WAIT_S, House, fields, filled, gated, hang_up, house, post, send, temporary, until
from in_process import fake_engine
from raw_http import Answer, exchange, speak
from remote_vae.errors import Unavailable
from remote_vae.protocol.output import Output
from remote_vae_serve.http import bodies

__all__ = ["temporary"]  # a fixture

Z = torch.zeros(1, 4, 256, 256)
BODY = 2**20
HELD_BACK = -64


def refusal(there: House, *pieces: bytes) -> Answer:
    answer = exchange(there.url, *pieces, timeout_s=WAIT_S)
    assert answer.status >= 400
    return answer


def wrong(request: bytes) -> bytes:
    return request.replace(b"dtype=float32", b"dtype=float99")


def announced(there: House, size: int, client: str) -> bytes:
    """The head of a request of that client, without its body."""
    z = torch.zeros(1, 4, 4, size // 64)  # as many bytes as it says: what is not right is not read at all
    request = post(z, path=there.path, x_forwarded_for=client)
    return request.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("status", "spoil"),
    [
        (400, {"edit": wrong}),
        (503, {"raises": Unavailable("No.", retry_after=1)}),
        (500, {"raises": RuntimeError("a fault of ours")}),
        (504, {"deadline_s": 0.2}),
    ],
    ids=["400", "503", "500", "504"],
)
def test_a_body_goes_with_the_answer_that_refuses_it(
    temporary: Path, door: str, status: int, spoil: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = gated()
    with house(engine, temporary, door, spoil.get("deadline_s", WAIT_S)) as there:
        if "raises" in spoil:
            monkeypatch.setattr(there.pipeline, "_unpacked", raising(spoil["raises"]))
        if "deadline_s" in spoil:
            engine.shut()
        request = post(Z, path=there.path)
        for _ in range(3):
            assert refusal(there, spoil.get("edit", bytes)(request)).status == status
        engine.open.set()
        monkeypatch.undo()
        until(lambda: not there.leftovers(), there.leftovers)


def raising(error: Exception) -> Any:
    def unpacked(*_: Any) -> Any:
        raise error

    return unpacked


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("when", ["in the middle of the body", "while it waits", "while it is decoded"])
def test_a_body_goes_with_the_client_that_leaves(temporary: Path, door: str, when: str) -> None:
    engine = gated()
    with house(engine, temporary, door) as there:
        engine.shut()
        connections: list[socket.socket] = []
        if when == "while it waits":
            connections.append(send(there, post(filled(1), path=there.path)))
            assert engine.entered.wait(WAIT_S)
        request = post(Z, path=there.path)
        leaver = send(there, request[:HELD_BACK] if when == "in the middle of the body" else request)
        arrived = len(there.bodies)
        until(lambda: len(there.bodies) >= arrived and there.bodies[-1]() is not None)
        if when == "while it is decoded":
            assert engine.entered.wait(WAIT_S)
        time.sleep(0.1)
        hang_up(leaver)
        engine.open.set()
        assert [speak(connection).status for connection in connections] == [200] * len(connections)
        there.assert_tidy()


@pytest.mark.parametrize("door", DOORS)
def test_a_body_for_which_there_is_no_room_is_refused_before_it_is_read(temporary: Path, door: str) -> None:
    with house(fake_engine(), temporary, door, max_bodies=2**26) as there:  # room for the largest that is allowed
        holding = [send(there, announced(there, 2**25, f"203.0.113.{client}")) for client in range(2)]
        until(lambda: len(there.bodies) >= 3)  # the first of all was the house's own
        answer = refusal(there, announced(there, 2**25, "203.0.113.2"))
        assert (answer.status, fields(answer)["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert "64 MiB already" in fields(answer)["error"]
        for connection in holding:
            hang_up(connection)
        there.assert_tidy()
        assert there.serve(Z).status == 200


@pytest.mark.parametrize("door", DOORS)
def test_of_bodies_without_a_length_what_has_come_is_counted(temporary: Path, door: str) -> None:
    with house(fake_engine(), temporary, door, max_bodies=2**26) as there:
        request = post(Z, path=there.path, transfer_encoding="chunked")
        head = b"\r\n".join(
            line for line in request.partition(b"\r\n\r\n")[0].split(b"\r\n") if not line.startswith(b"content-length")
        )
        piece = b"%x\r\n" % 2**22 + bytes(2**22) + b"\r\n"
        holding = send(there, head + b"\r\n\r\n", *[piece] * 10)
        until(lambda: any(len(body() or b"") == 10 * 2**22 for body in there.bodies))
        answer = refusal(there, head + b"\r\n\r\n", *[piece] * 10)
        assert (answer.status, fields(answer)["code"]) == (503, "overloaded")
        hang_up(holding)
        there.assert_tidy()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("held_back", [10 - BODY, HELD_BACK])
def test_a_body_slower_than_the_least_rate_is_given_up(
    temporary: Path, door: str, held_back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether nothing of it comes, or much at once and no more."""
    monkeypatch.setattr(bodies, "WINDOW_S", 0.3)
    with house(fake_engine(), temporary, door) as there:
        slow = send(there, post(Z, path=there.path)[:held_back])
        answer = speak(slow)
        assert (answer.status, fields(answer)["code"]) == (504, "deadline_exceeded")
        assert fields(answer)["parameter"] == "body"
        assert "64 KiB a second" in fields(answer)["error"]
        there.assert_tidy()


def test_a_body_that_keeps_the_rate_has_all_the_time_it_takes(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "WINDOW_S", 2.5)  # a machine that stalls for two seconds is no slow client
    with house(fake_engine(), temporary) as there:
        request = post(Z, path=there.path)
        piece = BODY // 16  # two fifths of what a window wants
        connection = send(there, request[:-BODY])
        for start in range(len(request) - BODY, len(request), piece):
            time.sleep(0.2)
            connection.sendall(request[start : start + piece])
        assert speak(connection).status == 200
        there.assert_tidy()


def test_no_client_takes_all_the_room(temporary: Path) -> None:
    with house(fake_engine(), temporary, max_bodies=2**26) as there:
        holding = [send(there, announced(there, 2**24, "203.0.113.1")) for _ in range(2)]
        until(lambda: len(there.bodies) >= 3)  # the first of all was the house's own
        assert refusal(there, announced(there, 2**24, "203.0.113.1")).status == 503
        holding.append(send(there, announced(there, 2**24, "203.0.113.2")))
        until(lambda: len(there.bodies) >= 4)
        for connection in holding:
            hang_up(connection)
        there.assert_tidy()


def test_the_budget_has_room_for_the_largest_body_however_small_it_is() -> None:
    assert bodies.Bodies(2**20, 1)._most_together == 2**20


def test_a_served_body_is_not_held_while_its_answer_is_sent(temporary: Path) -> None:
    with house(fake_engine(), temporary) as there:
        assert there.serve(Z[..., :64, :64], Output.PT).status == 200
        until(lambda: not there.leftovers(), there.leftovers)
