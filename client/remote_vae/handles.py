"""The in-cluster door: requests through a Ray Serve deployment handle. The only file of the client that knows Ray.

Tensors cross as numpy views inside a tuple of plain values (12 ms at 50 MB, where a pickled torch tensor takes 174), by
reference through the object store, never over Serve's gRPC handles, which stop at 4 MiB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from remote_vae.errors import (
    BlockingCall,
    InternalError,
    Overloaded,
    RemoteVAEError,
    TimedOut,
    Unavailable,
    UnknownModel,
)
from remote_vae.transports import DEFAULT_TIMEOUT, Timeout, Transport
from remote_vae.wire import DecodeRequest, Result

T = TypeVar("T")


class HandleTransport(Transport):
    """Calls the VAE deployment behind a handle.

    Args:
        handle: what `serve.get_app_handle(name)` gives.
        timeout: as for HTTP; of a pair, the second is used.
    """

    def __init__(self, handle: Any, timeout: Timeout = DEFAULT_TIMEOUT) -> None:
        self._handle = handle.options(_by_reference=True)
        self._timeout = timeout[1] if isinstance(timeout, tuple) else timeout

    @classmethod
    def of_app(cls, name: str, timeout: Timeout = DEFAULT_TIMEOUT) -> HandleTransport:
        """The transport to the application of that name in the cluster this process belongs to."""
        try:
            import ray
            from ray import serve
            from ray.serve.exceptions import RayServeException
        except ImportError as error:
            raise ImportError("A Ray handle needs Ray: pip install 'remote-vae[serve]'") from error
        if not ray.is_initialized():  # Serve would start a Ray of its own, in which there is no model
            raise UnknownModel(
                "This process has joined no Ray cluster: call ray.init('auto') first, with RAY_AUTH_MODE=token in its "
                "environment if that Ray uses tokens"
            )
        try:
            return cls(serve.get_app_handle(name), timeout)
        except RayServeException as error:
            raise UnknownModel(f"No Serve application {name!r} in this cluster: {error}") from error

    def send_one(self, request: DecodeRequest) -> Result:
        plain = request.to_plain()
        return Result.from_plain(self._wait(lambda: self._result(self._handle.decode.remote(plain))))

    async def send_one_async(self, request: DecodeRequest) -> Result:
        return Result.from_plain(await self._await(self._handle.decode.remote(request.to_plain())))

    def send_ref(self, request: DecodeRequest) -> Any:
        """As `send_one`, but the ObjectRef of the plain result: it can be handed on without a copy through this process."""
        plain = request.to_plain()
        return self._wait(lambda: self._reference(self._handle.decode.remote(plain)))

    async def send_ref_async(self, request: DecodeRequest) -> Any:
        return await self._await(self._handle.decode.remote(request.to_plain())._to_object_ref())

    def describe(self) -> dict[str, Any]:
        description: dict[str, Any] = self._wait(lambda: self._result(self._handle.describe.remote()))
        return description

    async def describe_async(self) -> dict[str, Any]:
        description: dict[str, Any] = await self._await(self._handle.describe.remote())
        return description

    def refuse_blocking(self) -> None:
        import ray

        # A Jupyter driver also has a running loop, but nobody else's work waits on it; an async actor's loop serves others.
        if _in_event_loop() and ray.get_runtime_context().get_actor_id() is not None:
            raise BlockingCall("RemoteVAE would block this async actor's event loop; use AsyncRemoteVAE and await it")

    def _result(self, response: Any) -> Any:
        with _cancelled_if_given_up(response):
            return response.result(timeout_s=self._timeout)

    def _reference(self, response: Any) -> Any:
        with _cancelled_if_given_up(response):
            return response._to_object_ref_sync(_timeout_s=self._timeout)

    def _wait(self, call: Callable[[], T]) -> T:
        self.refuse_blocking()
        try:
            if not _in_event_loop():
                return call()
            with ThreadPoolExecutor(1) as pool:  # Serve refuses to wait in a thread that has a running loop
                return pool.submit(call).result()
        except Exception as error:
            self._raise_ours(error)

    async def _await(self, response: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(_coroutine(response), self._timeout)
        except Exception as error:
            self._raise_ours(error)

    def _raise_ours(self, error: Exception) -> NoReturn:
        raise translated(error, self._timeout) from error


@contextmanager
def _cancelled_if_given_up(response: Any) -> Iterator[None]:
    """Tell the replica that nobody waits any more: a client that tries again would fill the queue with its own past."""
    try:
        yield
    except BaseException:
        response.cancel()
        raise


async def _coroutine(response: Awaitable[T]) -> T:
    try:
        return await response
    except asyncio.CancelledError:
        if hasattr(response, "cancel"):  # tell the replica: nobody waits for it any more
            response.cancel()
        raise


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def translated(error: Exception, timeout: float | None = None) -> RemoteVAEError:
    """The error of this package that an exception out of a handle call stands for."""
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RemoteVAEError):
        return cause
    if isinstance(cause, (TimeoutError, asyncio.TimeoutError)):
        return TimedOut(f"The model did not answer within {timeout} s")
    if isinstance(cause, BackPressureError):
        return Overloaded("The model's queue is full; try again", retry_after=1)
    if isinstance(cause, DeploymentUnavailableError):
        return Unavailable("The model cannot be deployed; see its Serve status", retry_after=10)
    if isinstance(cause, RayActorError):
        return Unavailable("The replica died in the middle of the request; try again", retry_after=1)
    if isinstance(cause, RayServeException):
        return Unavailable(f"Ray Serve cannot route to the model: {cause}", retry_after=5)
    return InternalError(f"The replica failed: {type(cause).__name__}; its log says more")
