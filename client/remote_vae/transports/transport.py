"""`Transport`: how requests reach a server: the seam, with the retries that all have, and a wait that can be watched. HTTP is in
`http`, Ray in `handle`."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from remote_vae.errors import BadRequest, RemoteVAEError
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae.transports import in_flight
from remote_vae.transports.retry import RetryPolicy, RetryState
from remote_vae.transports.waiting import OnWait
from remote_vae.transports.watch import Peek, watched, watched_async

IN_FLIGHT = 4
"""How many requests of one call, or of one client, are sent at a time."""


class Transport(ABC):
    """Carries requests to a server and results back. Subclasses say how one try goes; thread-safe."""

    retry_policy = RetryPolicy(retries=0)
    peek: Peek | None = None
    """What is known of the model without waking it, where that can be had while a request waits."""

    @abstractmethod
    def try_one(self, request: Request) -> Result:
        """Send one request and wait `request.deadline_s` for its result. Raises RemoteVAEError and nothing else."""

    @abstractmethod
    async def try_one_async(self, request: Request) -> Result:
        """The same without blocking the event loop."""

    @abstractmethod
    def describe(self, wake: bool = False) -> ModelDescription:
        """What the server says of the model; `wake` starts a replica to say it, where there is none."""

    @abstractmethod
    async def describe_async(self, wake: bool = False) -> ModelDescription: ...

    def send_one(self, request: Request) -> Result:
        """Send one request, again where that may help, and wait for its result. Raises RemoteVAEError and nothing else."""
        return self.send_with_retries(RetryState(self.retry_policy), request)

    async def send_one_async(self, request: Request) -> Result:
        """The same without blocking the event loop."""
        return await self.send_with_retries_async(RetryState(self.retry_policy), request)

    def send_with_retries(self, state: RetryState, request: Request) -> Result:
        """As `send_one`, within a retry state that began earlier: the deadline of a batch is the whole call's."""
        while True:
            try:
                return self.try_one(self._granted(state, request))
            except RemoteVAEError as error:
                self._pause(state.pause_after(error), error)

    async def send_with_retries_async(self, state: RetryState, request: Request) -> Result:
        """The same without blocking the event loop."""
        while True:
            try:
                return await self._try_async(state, request)
            except RemoteVAEError as error:
                pause_s = state.pause_after(error)
                if (flight := in_flight.current()) is not None:
                    flight.retries(pause_s, error)
                await asyncio.sleep(pause_s)

    def _pause(self, seconds: float, error: RemoteVAEError) -> None:
        """Before the next try. Raises Cancelled."""
        if (flight := in_flight.current()) is None:
            time.sleep(seconds)
        else:
            flight.pause(seconds, error)

    async def _try_async(self, state: RetryState, request: Request) -> Result:
        return await self.try_one_async(self._granted(state, request))

    def _granted(self, state: RetryState, request: Request) -> Request:
        """The request with the seconds that a try of it may take from now on."""
        return replace(request, deadline_s=state.left_s(self.retry_policy.one_try_s))

    def send_ref(self, request: Request) -> Any:
        """The Ray ObjectRef of the plain result (`calls.open_result` reads it)."""
        raise BadRequest("as_ref=True needs a Ray handle; over HTTP the result comes as bytes", parameter="as_ref")

    async def send_ref_async(self, request: Request) -> Any:
        return self.send_ref(request)

    def in_place_of(self, error: RemoteVAEError, request: Request) -> Result:
        """A result made otherwise, where that of the server could not be read; raises the error where there is none."""
        raise error

    def refuse_blocking(self) -> None:
        """Raise BlockingCall where this thread must not wait."""

    def close(self) -> None:
        """Give connections back."""

    def description(self, wake: bool, on_wait: OnWait | None) -> ModelDescription:
        """As `describe`; while a replica is started, `on_wait` is told."""
        if on_wait is None:
            return self.describe(wake)
        return watched(on_wait, self.peek, "describe", [partial(self.describe, wake)], IN_FLIGHT)[0]

    async def description_async(self, wake: bool, on_wait: OnWait | None) -> ModelDescription:
        """The same without blocking the event loop."""
        if on_wait is None:
            return await self.describe_async(wake)
        return (await watched_async(on_wait, self.peek, "describe", [partial(self.describe_async, wake)]))[0]

    def send(self, batch: Sequence[Request], on_wait: OnWait | None = None) -> list[Result]:
        """Send the requests of one call, at most `IN_FLIGHT` at a time; results in order.

        Args:
            on_wait: told what the call waits for, several times a second; what it raises ends the call.
        """
        self.refuse_blocking()
        states = [RetryState(self.retry_policy) for _ in batch]  # now: the deadline is the whole call's
        if on_wait is not None:
            runs = [partial(self.send_with_retries, *one) for one in zip(states, batch, strict=True)]
            return watched(on_wait, self.peek, batch[0].verb, runs, IN_FLIGHT)
        if len(batch) == 1:
            return [self.send_with_retries(states[0], batch[0])]
        with ThreadPoolExecutor(min(IN_FLIGHT, len(batch))) as pool:
            return list(pool.map(self.send_with_retries, states, batch))

    async def send_async(self, batch: Sequence[Request], on_wait: OnWait | None = None) -> list[Result]:
        """The same without blocking the event loop."""
        if len(batch) == 1 and on_wait is None:
            return [await self.send_one_async(batch[0])]
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def one(state: RetryState, request: Request) -> Result:
            async with slots:
                return await self.send_with_retries_async(state, request)

        runs = [partial(one, RetryState(self.retry_policy), request) for request in batch]
        return await watched_async(on_wait, self.peek, batch[0].verb, runs)
