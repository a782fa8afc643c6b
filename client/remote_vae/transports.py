"""How requests reach a server: the seam (`Transport`) and the HTTP door. The Ray door is in `handles`."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from remote_vae import errors
from remote_vae.errors import BadRequest, BrokenReply, ConnectionFailed, TimedOut
from remote_vae.wire import DecodeRequest, Result

Timeout = float | tuple[float, float] | None
"""Seconds to wait: for everything, or (to connect, for the answer); None waits for ever."""

DEFAULT_TIMEOUT: Timeout = (10.0, 300.0)  # a cold model loads its weights before it answers
IN_FLIGHT = 4


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


class HttpTransport(Transport):
    """Posts to a model's URL over kept-alive connections."""

    def __init__(self, endpoint: str, timeout: Timeout = DEFAULT_TIMEOUT, connections: int = IN_FLIGHT) -> None:
        if not endpoint.lower().startswith(("http://", "https://")):
            raise BadRequest(f"endpoint is {endpoint!r}; expected a URL such as http://127.0.0.1:8000/demo",
                             parameter="endpoint")  # fmt: skip
        self._endpoint = endpoint
        self._timeout = timeout
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=max(connections, IN_FLIGHT)))

    def send_one(self, request: DecodeRequest) -> Result:
        query, headers, body = request.to_http()
        response = self._request("POST", query, headers, body)
        return Result.from_http({name.lower(): value for name, value in response.headers.items()}, response.content)

    async def send_one_async(self, request: DecodeRequest) -> Result:
        return await asyncio.to_thread(self.send_one, request)

    def describe(self) -> dict[str, Any]:
        response = self._request("GET", [], {"accept": "application/json"}, None)
        try:
            description = response.json()
        except ValueError:
            description = None
        if not isinstance(description, dict):
            raise BrokenReply(f"{self._endpoint} did not describe a model; is it the URL of a remote-vae server?")
        return description

    async def describe_async(self) -> dict[str, Any]:
        return await asyncio.to_thread(self.describe)

    def close(self) -> None:
        self._session.close()

    def _request(self, method: str, query: Any, headers: dict[str, str], body: Any) -> requests.Response:
        try:
            response = self._session.request(
                method, self._endpoint, params=query, headers=headers, data=body, timeout=self._timeout
            )
        except requests.Timeout as error:
            raise TimedOut(f"{self._endpoint} did not answer within {self._timeout} s") from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise BrokenReply(f"{self._endpoint} broke off in the middle of its answer") from error
        except requests.ConnectionError as error:
            raise ConnectionFailed(f"{self._endpoint} cannot be reached; is the server running?") from error
        except requests.exceptions.InvalidURL as error:
            raise BadRequest(f"endpoint is {self._endpoint!r}, which is no URL", parameter="endpoint") from error
        except requests.RequestException as error:
            raise BrokenReply(f"{self._endpoint} answered with something that is no HTTP: {error}") from error
        if response.ok:
            return response
        lowered = {name.lower(): value for name, value in response.headers.items()}
        raise errors.parse(response.status_code, lowered, response.content)
