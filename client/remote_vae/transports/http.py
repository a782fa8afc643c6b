"""`HttpTransport`: requests over HTTP, by kept-alive connections."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit, urlunsplit

import requests
import urllib3

from remote_vae import errors
from remote_vae.errors import (
    BadRequest,
    BrokenReply,
    ConnectionFailed,
    ConnectionLost,
    RemoteVAEError,
    TimedOut,
    UntrustedCertificate,
)
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae.transports import connections as keep_alive
from remote_vae.transports import in_flight
from remote_vae.transports.connection_errors import is_distrust, is_late, is_no_http, unreadable_ca_bundle
from remote_vae.transports.in_flight import InFlight
from remote_vae.transports.retry import DEFAULT_POLICY, RetryPolicy, RetryState
from remote_vae.transports.transport import IN_FLIGHT, Transport

T = TypeVar("T")
CHUNK = 2**20
PIECE = 2**16  # bytes of a body that a line must take within the time-out of the connection
MAX_REPLY = 2**31  # bytes: a header alone makes us allocate no more
PEEK_S = 2.0
NO_ANSWER = (requests.TooManyRedirects, requests.exceptions.ContentDecodingError)


class PerProcess(Generic[T]):
    """Something that must not be shared over a fork, made anew in each process: a connection would hand one process the
    other's answers, and a pool's threads do not exist in the child. What came over the fork is left alone, not closed."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: tuple[int, T] | None = None
        self._lock = threading.Lock()

    def get(self) -> T:
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), self._make())
            return self._made[1]

    def close(self, close: Callable[[T], object]) -> None:
        """Call `close` with what this process has made; nothing is made to be closed."""
        with self._lock:
            made = self._made
        if made is not None and made[0] == os.getpid():
            close(made[1])


class HttpTransport(Transport):
    """Posts to a model's URL over kept-alive connections.

    Args:
        endpoint: the URL; may hold userinfo (`http://:TOKEN@host`) and a query.
        token: sent as `Authorization: Bearer`.
    """

    def __init__(
        self,
        endpoint: str,
        retry_policy: RetryPolicy = DEFAULT_POLICY,
        connections: int = IN_FLIGHT,
        token: str | None = None,
    ) -> None:
        # For messages: without the token that may stand in it. One of base64 may hold a slash.
        self._shown = re.sub(r"//[^/?#]*@|//:.*@", "//", endpoint)
        if not endpoint.lower().startswith(("http://", "https://")):
            raise BadRequest(f"endpoint is {self._shown!r}; expected a URL such as http://127.0.0.1:8000/demo",
                             parameter="endpoint")  # fmt: skip
        self._endpoint = endpoint
        self._authorization = _authorization(token)
        self.retry_policy = retry_policy
        size = max(connections, IN_FLIGHT)
        self._threads = PerProcess(lambda: ThreadPoolExecutor(size, thread_name_prefix="remote-vae-http"))
        self._session = PerProcess(lambda: keep_alive.session(size + 1))  # one to `peek` by, beside them

    def try_one(self, request: Request) -> Result:
        query, headers, body = request.to_http()
        # Decoding is what the URL itself does, on every server of the protocol.
        below = "" if request.verb == "decode" else request.verb
        return Result.from_http(*self._request("POST", below, query, headers, body, request.deadline_s))

    async def try_one_async(self, request: Request) -> Result:
        return await self._in_a_thread(request.verb, lambda: self.try_one(request))

    async def _in_a_thread(self, verb: str, run: Callable[[], T]) -> T:
        """What it returns; cancelled, its connection is closed, and the server drops the work."""
        flight = in_flight.current() or InFlight(verb)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads.get(), flight.carry, run)
        except asyncio.CancelledError:
            flight.break_off()
            raise

    async def _try_async(self, state: RetryState, request: Request) -> Result:
        # What is left is asked in the thread: the call may have waited for one.
        return await self._in_a_thread(request.verb, lambda: self.try_one(self._granted(state, request)))

    def describe(self, wake: bool = False) -> ModelDescription:
        return ModelDescription.from_plain(self._read("describe", "POST") if wake else self._read())

    def describe_models(self) -> list[ModelDescription]:
        """All models of the server that is the endpoint; starts none of them."""
        models = self._read("models").get("models")
        if not isinstance(models, list):
            raise BrokenReply(f"{self._shown} has no list of models; is it the URL of a remote-vae server?")
        return [ModelDescription.from_plain(model) for model in models]

    async def describe_async(self, wake: bool = False) -> ModelDescription:
        return await self._in_a_thread("describe", lambda: self.describe(wake))

    def peek(self, request_id: str) -> ModelDescription | None:
        """What the server says of the model, and of a request of ours that is with it; None where it says nothing at once."""
        query, headers = [("waiting", request_id)], {"accept": "application/json"}
        try:
            _, content = self._request("GET", "", query, headers, None, PEEK_S)
            return ModelDescription.from_plain(json.loads(content))
        except (RemoteVAEError, ValueError, RecursionError):
            return None

    def _read(self, below: str = "", method: str = "GET") -> dict[str, Any]:
        """The JSON object at a path below the endpoint, with retries. Raises RemoteVAEError."""
        state = RetryState(self.retry_policy)
        while True:
            try:
                left_s = state.left_s(self.retry_policy.one_try_s)
                _, content = self._request(method, below, [], {"accept": "application/json"}, None, left_s)
                break
            except RemoteVAEError as error:
                self._pause(state.pause_after(error), error)
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise BrokenReply(f"{self._shown} did not describe itself; is it the URL of a remote-vae server?")
        return fields

    def close(self) -> None:
        self._threads.close(lambda threads: threads.shutdown(wait=False))
        self._session.close(lambda session: session.close())

    def _request(
        self, method: str, below: str, query: Any, headers: dict[str, str], body: Any, left_s: float | None
    ) -> tuple[dict[str, str], bytearray]:
        """Headers, with lower-case names, and body of a 2xx. Raises RemoteVAEError for everything else."""
        give_up = None if left_s is None else time.monotonic() + left_s
        pieces: Any = None if body is None else _Pieces(body, give_up)
        connect_s, answer_s = (_sooner(part, left_s) for part in self.retry_policy.connect_and_answer)
        if (flight := in_flight.current()) is not None and flight.id:
            headers = {**headers, "x-request-id": flight.id}
        try:
            with _breakable(), self._session.get().request(
                method, _below(self._endpoint, below), params=query, headers=headers, auth=self._authorization,
                data=pieces, timeout=(connect_s, answer_s), stream=True,
            ) as response:  # fmt: skip
                content = _content(response, give_up)
        except requests.ConnectTimeout as error:
            raise ConnectionFailed(f"{self._shown} cannot be reached in time; is the server running?") from error
        except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
            raise self._late() from error
        except requests.ConnectionError as error:
            if is_late(error):
                raise self._late() from error
            if is_no_http(error):
                raise BrokenReply(f"{self._shown} answered with something that is no HTTP") from error
            self._refuse_ca_bundle(error)
            if is_distrust(error):
                raise UntrustedCertificate(
                    f"{self._shown} has a certificate that this machine does not trust; if you do, set REQUESTS_CA_BUNDLE to "
                    "the file of those who signed it"
                ) from error
            raise ConnectionFailed(f"{self._shown} cannot be reached; is the server running?") from error
        except (requests.exceptions.InvalidURL, ValueError):
            # The cause would show the URL, with the token in it.
            raise BadRequest(f"endpoint is {self._shown!r}, which is no URL", parameter="endpoint") from None
        except (*NO_ANSWER, urllib3.exceptions.DecodeError) as error:
            raise BrokenReply(f"{self._shown} gave no answer of this protocol ({type(error).__name__})") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            self._refuse_ca_bundle(error)
            raise ConnectionLost(
                f"{self._shown} broke off in the middle of its answer ({type(error).__name__})"
            ) from error
        lowered = {name.lower(): value for name, value in response.headers.items()}
        if not response.ok:
            raise errors.parse(response.status_code, lowered, bytes(content))
        return lowered, content

    def _refuse_ca_bundle(self, error: Exception) -> None:
        """Raises UntrustedCertificate where this machine's own setting is why no certificate can be trusted."""
        if isinstance(error, OSError) and (setting := unreadable_ca_bundle(error)):
            raise UntrustedCertificate(
                f"{self._shown} was not asked: {setting}, which is neither a file of certificates (PEM) that can be read nor a "
                "folder of them; correct the variable, or unset it"
            ) from error

    def _late(self) -> TimedOut:
        granted = f"timeout {self.retry_policy.timeout} s, deadline {self.retry_policy.deadline} s"
        return TimedOut(f"{self._shown} did not answer in time ({granted})")


@contextmanager
def _breakable() -> Iterator[None]:
    """What runs within is ended where the request that this thread carries is broken off. Raises Cancelled."""
    if (flight := in_flight.current()) is None:
        yield
        return
    with keep_alive.open_socket() as opened, flight.broken_off_by(opened.shut_down):
        yield


class _Pieces:
    """A body, sent a piece at a time: a socket's time-out is for all that one call sends, and the latents of a video on a
    slow line take longer than a connection may. Iterated anew it is sent anew, as a redirect asks for."""

    def __init__(self, body: bytes | memoryview, give_up: float | None) -> None:
        self._body = memoryview(body)
        self._give_up = give_up

    def __len__(self) -> int:
        return len(self._body)

    def __iter__(self) -> Iterator[memoryview]:
        for start in range(0, len(self._body), PIECE):
            if self._give_up is not None and time.monotonic() > self._give_up:
                raise TimeoutError
            yield self._body[start : start + PIECE]


def _content(response: requests.Response, give_up: float | None) -> bytearray:
    """The body, read as it comes into memory of its length: a reply is never held twice. (A time-out of the socket's starts
    anew with every packet, ours does not.)"""
    announced = response.headers.get("content-length", "")
    plain = announced.isdecimal() and len(announced) < 20 and "content-encoding" not in response.headers
    body = bytearray(int(announced)) if plain and int(announced) <= MAX_REPLY else bytearray()
    filled, flight = 0, in_flight.current()
    while chunk := response.raw.read1(CHUNK, decode_content=True):
        body[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
        if flight is not None:
            flight.receives(filled, int(announced) if plain else None)
        if give_up is not None and time.monotonic() > give_up:
            raise requests.Timeout
    del body[filled:]
    return body


def _sooner(seconds: float | None, left_s: float | None) -> float | None:
    return min((value for value in (seconds, left_s) if value is not None), default=None)


def _below(endpoint: str, path: str) -> str:
    """The URL of a path below the endpoint's; the endpoint itself for "", or where it already ends so."""
    if not path:
        return endpoint
    parts = urlsplit(endpoint)
    trunk = parts.path.rstrip("/")
    if trunk.endswith(f"/{path}"):
        return endpoint
    return urlunsplit(parts._replace(path=f"{trunk.removesuffix('/decode')}/{path}"))


def _authorization(token: str | None) -> Callable[[requests.PreparedRequest], requests.PreparedRequest] | None:
    """Sets the header. (As a header of the request, `requests` would put what ~/.netrc says of the host in its place.)"""
    if token is None:
        return None
    if not token or not token.isascii() or not token.isprintable():
        raise BadRequest("token is empty or holds a character that no header can", parameter="token")

    def authorise(prepared: requests.PreparedRequest) -> requests.PreparedRequest:
        prepared.headers["authorization"] = f"Bearer {token}"
        return prepared

    return authorise
