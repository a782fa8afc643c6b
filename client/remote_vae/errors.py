"""Every error of remote-vae, on both sides of the wire.

RemoteVAEError
├── BadRequest             400 bad_request             a parameter or the body is wrong; `parameter` names it (a ValueError)
├── Unauthorized           401 unauthorized            no token, or a wrong one
├── Forbidden              403 forbidden               a page of an origin that is not allowed asks, from a browser
├── UnknownModel           404 unknown_model           no such model here; the message names those that are
├── UnknownRoute           404 unknown_route           no such path; with a `retry_after`, perhaps not yet
├── WrongMethod            405 wrong_method            GET where POST is meant, or the other way round
├── BodyTooLarge           413 body_too_large          the body is over the server's limit
├── UnknownContentType     415 unknown_content_type    the Content-Type is none of the protocol's
├── InternalError          500 internal_error          the server's own fault; details are in its log, not in the answer
│   └── ProtocolMismatch   500 protocol_mismatch       client and replica speak different versions of the handle protocol
├── Unavailable            503 unavailable             try again after `retry_after` seconds
│   ├── Overloaded         503 overloaded              the queue is full
│   ├── ModelStarting      503 model_starting          a replica is being started, or waits for resources
│   └── ModelFailed        503 model_failed            the model cannot be loaded; the message says why
├── DeadlineExceeded       504 deadline_exceeded       the server gave up at the request's deadline (a TimeoutError)
└── (the client's own, never sent)
    ├── ConnectionFailed       connection_failed       nobody answers at the endpoint, or hangs up at once (a ConnectionError)
    │   └── UntrustedCertificate  untrusted_certificate  its certificate is not trusted here, or whom to trust cannot be read
    ├── TimedOut               timed_out               the answer did not come within the client's timeout (a TimeoutError)
    ├── BrokenReply            broken_reply            what came back is no answer of this protocol
    │   └── ConnectionLost     connection_lost         the connection broke in the middle of the answer
    ├── Cancelled              cancelled               whoever waited for the call has ended it
    └── BlockingCall           blocking_call           a blocking call through a handle inside an async actor (a RuntimeError)

An error is the same on either side: the server renders it as JSON (`render`), the client makes it again (`parse`), and
through a Ray handle it travels pickled.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Mapping
from typing import ClassVar


class RemoteVAEError(Exception):
    """Base of all errors here.

    Args:
        message: a sentence that says what to do.
        parameter: the request parameter that is at fault, if one is.
        retry_after: seconds after which another try makes sense.
        request_id: the server's id of the request, for its log.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        parameter: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.retry_after = retry_after
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message


class BadRequest(RemoteVAEError, ValueError):
    code, status = "bad_request", 400


class Unauthorized(RemoteVAEError):
    code, status = "unauthorized", 401


class Forbidden(RemoteVAEError):
    code, status = "forbidden", 403


class UnknownModel(RemoteVAEError):
    code, status = "unknown_model", 404


class UnknownRoute(RemoteVAEError):
    code, status = "unknown_route", 404


class WrongMethod(RemoteVAEError):
    code, status = "wrong_method", 405


class BodyTooLarge(RemoteVAEError):
    code, status = "body_too_large", 413


class UnknownContentType(RemoteVAEError):
    code, status = "unknown_content_type", 415


class InternalError(RemoteVAEError):
    code, status = "internal_error", 500


class ProtocolMismatch(InternalError):
    code = "protocol_mismatch"


class Unavailable(RemoteVAEError):
    code, status = "unavailable", 503


class Overloaded(Unavailable):
    code = "overloaded"


class ModelStarting(Unavailable):
    code = "model_starting"


class ModelFailed(Unavailable):
    code = "model_failed"


class DeadlineExceeded(RemoteVAEError, TimeoutError):
    code, status = "deadline_exceeded", 504


class ConnectionFailed(RemoteVAEError, ConnectionError):
    code = "connection_failed"


class UntrustedCertificate(ConnectionFailed):
    code = "untrusted_certificate"


class TimedOut(RemoteVAEError, TimeoutError):
    code = "timed_out"


class BrokenReply(RemoteVAEError):
    code = "broken_reply"


class ConnectionLost(BrokenReply):
    code = "connection_lost"


class Cancelled(RemoteVAEError):
    code = "cancelled"


class BlockingCall(RemoteVAEError, RuntimeError):
    code = "blocking_call"


SENT: tuple[type[RemoteVAEError], ...] = (
    BadRequest, Unauthorized, Forbidden, UnknownModel, UnknownRoute, WrongMethod, BodyTooLarge, UnknownContentType,
    InternalError, ProtocolMismatch, Unavailable, Overloaded, ModelStarting, ModelFailed, DeadlineExceeded,
)  # fmt: skip
BROKE_OFF = b"Internal Server Error"
"""All that Serve's own proxy says where the process died that should have answered; `proxy.middlewares` says more."""
COMING_UP_S = 1.0
"""Retry-After of a 404 of Serve's own proxy, which for a moment after its start knows no route."""
_BY_CODE = {error.code: error for error in SENT}
# A stranger's 403 is about something else than the origin of a page: a BadRequest, as other 4xx. 408 and 429 are Serve's own.
_BY_STATUS = {error.status: error for error in reversed(SENT) if error is not Forbidden}
_BY_STATUS |= {408: DeadlineExceeded, 429: Overloaded}


def let_go_of_frames(error: BaseException) -> None:
    """Empty the finished frames of an error and of those that led to it. They hold requests and tensors; where they hold a task
    too, and with it the error itself, all of that would wait for the garbage collector."""
    seen: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and not any(one is known for known in seen):
            seen.append(one)
            traceback.clear_frames(one.__traceback__)
            left += [one.__cause__, one.__context__]


def render(error: RemoteVAEError) -> tuple[int, dict[str, str], bytes]:
    """The error as an HTTP answer: status, headers, JSON body."""
    fields = {"error": error.message, "code": error.code, "request_id": error.request_id}
    if error.parameter is not None:
        fields["parameter"] = error.parameter
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return error.status, headers, json.dumps(fields).encode()


def parse(status: int, headers: Mapping[str, str], body: bytes) -> RemoteVAEError:
    """The error that an HTTP answer other than 2xx stands for; answers of strangers (a proxy's page) included.

    Args:
        headers: with lower-case names.
    """
    try:
        fields = json.loads(body)
        message, code = str(fields["error"]), str(fields.get("code"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        text = " ".join(body[:200].decode("utf-8", "replace").split())
        fields, code = {}, ""
        message = f"The server answered {status} and no error of this protocol: {text or 'an empty body'}"
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status) or (BadRequest if 400 <= status < 500 else InternalError)
    retry_after = _seconds(headers.get("retry-after", ""))
    if status == 500 and body == BROKE_OFF:
        kind = Unavailable
    if (
        status == 404 and not fields and b"/-/routes" in body
    ):  # Serve's: no application of ours is there yet to name models
        kind, retry_after = UnknownRoute, retry_after or COMING_UP_S
    return kind(
        message,
        parameter=fields.get("parameter"),
        retry_after=retry_after,
        request_id=fields.get("request_id") or headers.get("x-request-id"),
    )


def _seconds(retry_after: str) -> float | None:
    """What a Retry-After says; None where nobody can wait so long: `nan`, `inf`, less than nothing."""
    try:
        seconds = float(retry_after)
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None
