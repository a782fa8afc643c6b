"""How requests reach a server: the seam (`Transport`) and the HTTP door. The Ray door is in `handles`."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import requests
import urllib3
from requests.adapters import HTTPAdapter

from remote_vae import errors
from remote_vae.errors import BadRequest, BrokenReply, ConnectionFailed, TimedOut
from remote_vae.wire import DecodeRequest, Result

T = TypeVar("T")
Timeout = float | tuple[float | None, float | None] | None
"""Seconds to wait: for everything, or (to connect, for the answer); None waits for ever."""

DEFAULT_TIMEOUT: Timeout = (10.0, 300.0)  # a cold model loads its weights before it answers
IN_FLIGHT = 4
CHUNK = 2**20


class Transport(ABC):
    """Carries requests to a server and results back. Subclasses say how one request goes; thread-safe."""

    @abstractmethod
    def send_one(self, request: DecodeRequest) -> Result:
        """Send one request and wait for its result. Raises RemoteVAEError and nothing else."""

    @abstractmethod
    async def send_one_async(self, request: DecodeRequest) -> Result:
        """The same without blocking the event loop."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the server says of the model."""

    @abstractmethod
    async def describe_async(self) -> dict[str, Any]: ...

    def send_ref(self, request: DecodeRequest) -> Any:
        """The Ray ObjectRef of the plain result (`calls.open_result` reads it)."""
        raise BadRequest("as_ref=True needs a Ray handle; over HTTP the result comes as bytes", parameter="as_ref")

    async def send_ref_async(self, request: DecodeRequest) -> Any:
        return self.send_ref(request)

    def refuse_blocking(self) -> None:
        """Raise BlockingCall where this thread must not wait."""

    def close(self) -> None:
        """Give connections back."""

    def send(self, batch: Sequence[DecodeRequest]) -> list[Result]:
        """Send the requests of one call, at most `IN_FLIGHT` at a time; results in order."""
        self.refuse_blocking()
        if len(batch) == 1:
            return [self.send_one(batch[0])]
        with ThreadPoolExecutor(min(IN_FLIGHT, len(batch))) as pool:
            return list(pool.map(self.send_one, batch))

    async def send_async(self, batch: Sequence[DecodeRequest]) -> list[Result]:
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def one(request: DecodeRequest) -> Result:
            async with slots:
                return await self.send_one_async(request)

        return list(await asyncio.gather(*map(one, batch)))


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


def _session(connections: int) -> requests.Session:
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=connections))
    return session


def _patience(timeout: Timeout) -> float | None:
    """Seconds for the whole answer; None for ever. Raises BadRequest."""
    parts = timeout if isinstance(timeout, tuple) else (timeout,)
    for part in parts:
        if part is not None and (isinstance(part, bool) or not isinstance(part, (int, float)) or not part > 0):
            raise BadRequest(
                f"timeout is {timeout!r}; expected seconds above 0, a pair of them, or None", parameter="timeout"
            )
    return None if None in parts else sum(part for part in parts if part is not None)


class HttpTransport(Transport):
    """Posts to a model's URL over kept-alive connections."""

    def __init__(self, endpoint: str, timeout: Timeout = DEFAULT_TIMEOUT, connections: int = IN_FLIGHT) -> None:
        if not endpoint.lower().startswith(("http://", "https://")):
            raise BadRequest(f"endpoint is {endpoint!r}; expected a URL such as http://127.0.0.1:8000/demo",
                             parameter="endpoint")  # fmt: skip
        self._endpoint = endpoint
        self._shown = re.sub(r"//[^/]*@", "//", endpoint)  # for messages: without the token that may stand in it
        self._timeout = timeout
        self._patience = _patience(timeout)
        size = max(connections, IN_FLIGHT)
        self._threads = PerProcess(lambda: ThreadPoolExecutor(size, thread_name_prefix="remote-vae-http"))
        self._session = PerProcess(lambda: _session(size))

    def send_one(self, request: DecodeRequest) -> Result:
        query, headers, body = request.to_http()
        return Result.from_http(*self._request("POST", query, headers, body))

    async def send_one_async(self, request: DecodeRequest) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads.get(), self.send_one, request)

    def describe(self) -> dict[str, Any]:
        _, content = self._request("GET", [], {"accept": "application/json"}, None)
        try:
            description = json.loads(content)
        except (ValueError, RecursionError):
            description = None
        if not isinstance(description, dict):
            raise BrokenReply(f"{self._shown} did not describe a model; is it the URL of a remote-vae server?")
        return description

    async def describe_async(self) -> dict[str, Any]:
        return await asyncio.get_running_loop().run_in_executor(self._threads.get(), self.describe)

    def close(self) -> None:
        self._threads.get().shutdown(wait=False)
        self._session.get().close()

    def _request(self, method: str, query: Any, headers: dict[str, str], body: Any) -> tuple[dict[str, str], bytes]:
        """Headers, with lower-case names, and body of a 2xx. Raises RemoteVAEError for everything else."""
        give_up = None if self._patience is None else time.monotonic() + self._patience
        try:
            with self._session.get().request(
                method, self._endpoint, params=query, headers=headers, data=body, timeout=self._timeout, stream=True
            ) as response:
                content = self._content(response.raw, give_up)
        except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
            raise TimedOut(f"{self._shown} did not answer within {self._timeout} s") from error
        except requests.ConnectionError as error:
            if _is_no_http(error):
                raise BrokenReply(f"{self._shown} answered with something that is no HTTP") from error
            raise ConnectionFailed(f"{self._shown} cannot be reached; is the server running?") from error
        except requests.exceptions.InvalidURL as error:
            raise BadRequest(f"endpoint is {self._shown!r}, which is no URL", parameter="endpoint") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise BrokenReply(
                f"{self._shown} broke off in the middle of its answer ({type(error).__name__})"
            ) from error
        lowered = {name.lower(): value for name, value in response.headers.items()}
        if not response.ok:
            raise errors.parse(response.status_code, lowered, content)
        return lowered, content

    def _content(self, raw: Any, give_up: float | None) -> bytes:
        """The body, read as it comes: a time-out of the socket's starts anew with every packet, ours does not."""
        chunks = []
        while chunk := raw.read1(CHUNK, decode_content=True):
            chunks.append(chunk)
            if give_up is not None and time.monotonic() > give_up:
                raise requests.Timeout
        return b"".join(chunks)


def _is_no_http(error: requests.ConnectionError) -> bool:
    """Whether the peer sent something, and it was not HTTP. (A peer that hangs up is a RemoteDisconnected.)"""
    reasons = getattr(error.args[0], "args", ()) if error.args else ()
    return any(
        isinstance(reason, http.client.HTTPException) and not isinstance(reason, http.client.RemoteDisconnected)
        for reason in reasons
    )
