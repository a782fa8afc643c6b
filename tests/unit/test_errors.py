"""An error is the same on either side of either door."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator

import pytest

from remote_vae import errors
from remote_vae.errors import RemoteVAEError


def all_errors(base: type[RemoteVAEError] = RemoteVAEError) -> Iterator[type[RemoteVAEError]]:
    for error in base.__subclasses__():
        yield error
        yield from all_errors(error)


ALL = list(all_errors())


def lowered(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@pytest.mark.parametrize("kind", errors.SENT)
def test_an_error_over_http_comes_out_as_it_went_in(kind: type[RemoteVAEError]) -> None:
    sent = kind("Do this.", parameter="shape", retry_after=7, request_id="r-1")
    status, headers, body = errors.render(sent)
    received = errors.parse(status, lowered(headers), body)
    assert status == kind.status
    assert type(received) is kind
    assert (received.message, received.parameter, received.retry_after, received.request_id) == (
        "Do this.", "shape", 7, "r-1",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_pickling_with_everything_it_carries(kind: type[RemoteVAEError]) -> None:
    """Through a Ray handle it travels pickled."""
    sent = kind("Do this.", parameter="shape", retry_after=1.5, request_id="r-1")
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is kind
    assert vars(received) == vars(sent)
    assert str(received) == str(sent) == "Do this. (request r-1)"


def test_every_error_that_is_sent_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in ALL]
    assert len(set(codes)) == len(codes)
    never_sent = {errors.ConnectionFailed, errors.UntrustedCertificate, errors.TimedOut, errors.BrokenReply,
                  errors.ConnectionLost, errors.Cancelled, errors.BlockingCall}  # fmt: skip
    assert set(errors.SENT) == set(ALL) - never_sent


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"[├└]── ([A-Z]\w+) +(?:(\d{3}) )?(\w+)  ", errors.__doc__ or "")
    of_code = {kind.__name__: (str(kind.status) if kind in errors.SENT else "", kind.code) for kind in ALL}
    assert {name: (status, code) for name, status, code in drawn} == of_code


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.BadRequest, ValueError),
        (errors.ConnectionFailed, ConnectionError),
        (errors.TimedOut, TimeoutError),
        (errors.BlockingCall, RuntimeError),
    ],
)
def test_who_does_not_know_us_can_catch_the_builtin(kind: type[RemoteVAEError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match=r"^no$"):
        raise kind("no")


def test_the_body_has_the_fields_of_the_contract_and_leaves_out_what_is_not_known() -> None:
    status, headers, body = errors.render(errors.BodyTooLarge("Too large.", request_id="r-1"))
    assert (status, headers) == (413, {"content-type": "application/json"})
    assert json.loads(body) == {"error": "Too large.", "code": "body_too_large", "request_id": "r-1"}


@pytest.mark.parametrize(("seconds", "header"), [(0.01, "1"), (1, "1"), (1.2, "2"), (30, "30")])
def test_retry_after_is_whole_seconds_and_never_zero(seconds: float, header: str) -> None:
    _, headers, _ = errors.render(errors.Overloaded("Full.", retry_after=seconds))
    assert headers["retry-after"] == header


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequest), (401, errors.Unauthorized), (403, errors.BadRequest), (404, errors.UnknownModel),
        (405, errors.WrongMethod), (413, errors.BodyTooLarge), (415, errors.UnknownContentType),
        (418, errors.BadRequest), (429, errors.Overloaded), (500, errors.InternalError), (502, errors.InternalError),
        (503, errors.Unavailable), (504, errors.DeadlineExceeded),
    ],
)  # fmt: skip
def test_a_strangers_page_becomes_the_error_of_its_status(status: int, kind: type[RemoteVAEError]) -> None:
    page = b"<html>\n<h1>nginx says no</h1></html>"
    error = errors.parse(status, {"content-type": "text/html", "x-request-id": "proxy-7"}, page)
    assert type(error) is kind
    assert str(status) in error.message
    assert "nginx says no" in error.message
    assert error.request_id == "proxy-7"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff\xfe\x00", b"null", b"3", b'"no"', b"[]", b'["error"]', b"{}", b'{"detail": "no"}',
        b'{"error": "no", "code": 7}', b'{"error": "no", "code": ["x"]}', b'{"error": "no", "code": {"a": 1}}',
        b'{"error": {"message": "no"}}', b'{"error": null}', b"[" * 100_000,
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)  # fmt: skip
def test_whatever_a_stranger_sends_as_json_is_still_one_of_our_errors(body: bytes) -> None:
    error = errors.parse(503, {}, body)
    assert type(error) is errors.Unavailable
    assert error.message


def test_a_long_page_is_cut() -> None:
    assert len(errors.parse(502, {}, b"x" * 100_000).message) < 400


def test_a_code_from_the_future_falls_back_to_its_status() -> None:
    error = errors.parse(503, {}, b'{"error": "Later.", "code": "from_the_future", "request_id": "r-1"}')
    assert type(error) is errors.Unavailable
    assert (error.message, error.request_id) == ("Later.", "r-1")


@pytest.mark.parametrize("date", ["Wed, 21 Oct 2026 07:28:00 GMT", "soon", ""])
def test_a_retry_after_that_is_no_number_is_left_out(date: str) -> None:
    assert errors.parse(503, {"retry-after": date}, b"").retry_after is None
