"""`HandleTransport`: requests through a Ray Serve deployment handle, in its cluster. What it leans on in Ray is in
`ray_internals`.

Tensors cross as numpy views inside a tuple of plain values (12 ms at 50 MB, where a pickled torch tensor takes 174): large ones
by reference through the object store, small ones by value; see `call_size`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from remote_vae import ray_internals
from remote_vae.errors import (
    BlockingCall,
    InternalError,
    Overloaded,
    RemoteVAEError,
    TimedOut,
    Unavailable,
    UnknownModel,
)
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request, announced_to_plain
from remote_vae.protocol.result import Result
from remote_vae.transports import in_flight
from remote_vae.transports.call_size import CallSize
from remote_vae.transports.retry import DEFAULT_POLICY, RetryPolicy
from remote_vae.transports.transport import Transport

T = TypeVar("T")
HandedBack = tuple[tuple[str, float], ...]
"""The replicas with long work before them that have handed a request back, each with the seconds of it: none keeps the request
from one that is free. It was let in by the first, and is never refused by the next."""
MODEL_DEPLOYMENT = "VAE"
"""Name of the deployment in a model's application."""
PROBE_S, PROBE_AGAIN_S = 5.0, 300.0
"""Where the port of the replicas' gRPC is closed between two nodes, Serve would try for as long as it is waited for."""
_MOST = CallSize(0.0)
FULL_PAUSE_S = 0.1
"""Before a request that was handed back is sent again, where Serve's own queue is full meanwhile."""


class HandleTransport(Transport):
    """Calls the VAE deployment behind a handle.

    Args:
        handle: what `serve.get_app_handle(name)` gives.
        retry_policy: as for HTTP; of a pair of time-outs, the second is used.
    """

    def __init__(self, handle: Any, retry_policy: RetryPolicy = DEFAULT_POLICY) -> None:
        self._handle, self._by_value = ray_internals.by_reference(handle), ray_internals.by_value(handle)
        self._methods: dict[tuple[str, bool], Any] = {}
        self._sizes: CallSize | None = None
        self._probes_again = math.inf  # until it has answered by reference
        self.retry_policy = replace(retry_policy, timeout=retry_policy.answer_s)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._handle, self.retry_policy)

    @classmethod
    def of_app(cls, name: str, retry_policy: RetryPolicy = DEFAULT_POLICY) -> HandleTransport:
        """The transport to the application of that name in the cluster this process belongs to."""
        try:
            import ray
            from ray.serve.exceptions import RayServeException
        except ImportError as error:
            raise ImportError("A Ray handle needs Ray: pip install 'remote-vae[serve]'") from error
        if not ray.is_initialized():  # Serve would start a Ray of its own, in which there is no model
            raise UnknownModel(
                "This process has joined no Ray cluster: call ray.init('auto') first, with RAY_AUTH_MODE=token in its "
                "environment if that Ray uses tokens, and RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 if it is remote-vae-serve's own"
            )
        try:
            return cls(_app_handle(name), retry_policy)
        except RayServeException as error:
            raise UnknownModel(f"No Serve application {name!r} in this cluster: {error}") from error

    def try_one(self, request: Request) -> Result:
        rounds = _Rounds(self._wait_s(request))
        if self._is_to_probe(request):
            with suppress(RemoteVAEError):
                self._learn_sizes(self._wait(self._probe, _result, PROBE_S))
        while True:
            try:
                plain = self._wait(partial(self._call, request, rounds.handed_back), _result, rounds.left_s())
            except Overloaded as error:
                time.sleep(rounds.pause_after(error))
            except InternalError:
                self._sizes = None  # it may have been a reply that no message holds: the model is another by now
                raise
            else:
                if not rounds.goes_on(plain):
                    return self._answered(plain)

    async def try_one_async(self, request: Request, handed_back: HandedBack = ()) -> Result:
        rounds = _Rounds(self._wait_s(request), handed_back)
        if self._is_to_probe(request):
            with suppress(RemoteVAEError):
                self._learn_sizes(await _await(self._probe(), PROBE_S))
        while True:
            try:
                plain = await _await(self._call(request, rounds.handed_back), rounds.left_s())
            except Overloaded as error:
                await asyncio.sleep(rounds.pause_after(error))
            except InternalError:
                self._sizes = None
                raise
            else:
                if not rounds.goes_on(plain):
                    return self._answered(plain)

    async def announce_async(self, request: Request) -> float:
        """Seconds until a request whose bytes have not come yet would have its turn at a replica. Raises what that would refuse
        it with, as far as it can be told without them."""
        return float(await _await(self._handle.announce.remote(request.verb, announced_to_plain(request)), None))

    def send_ref(self, request: Request) -> Any:
        """As `send_one`, but the ObjectRef of the plain result: it can be handed on without a copy through this process."""
        return self._wait(
            lambda: self._call(request, as_ref=True), ray_internals.reference_of, self.retry_policy.answer_s
        )

    async def send_ref_async(self, request: Request) -> Any:
        return await _await(
            ray_internals.reference_of_async(self._call(request, as_ref=True)), self.retry_policy.answer_s
        )

    def describe(self, wake: bool = False) -> ModelDescription:
        """By a replica, always; `wake` has one whose model failed to load try again."""
        plain = self._wait(lambda: self._handle.describe.remote(wake), _result, self.retry_policy.answer_s)
        return ModelDescription.from_plain(plain)

    async def describe_async(self, wake: bool = False) -> ModelDescription:
        return ModelDescription.from_plain(await _await(self._handle.describe.remote(wake), self.retry_policy.answer_s))

    def _answered(self, plain: Any) -> Result:
        if self._probes_again == math.inf:
            self._probes_again = 0.0
        return Result.from_plain(plain)

    def _is_to_probe(self, request: Request) -> bool:
        """Whether it is worth a call by value, to learn whether that comes through and how large the model's replies are: once
        the model has answered by reference, for a request that is small itself."""
        if self._sizes is not None or time.monotonic() < self._probes_again or not _MOST.is_small(request):
            return False
        self._probes_again = time.monotonic() + PROBE_AGAIN_S
        return True

    def _probe(self) -> Any:
        return self._by_value.describe.remote()

    def _learn_sizes(self, plain: Any) -> None:
        self._sizes = CallSize.of(ModelDescription.from_plain(plain))

    def _wait_s(self, request: Request) -> float | None:
        """A transport without any time-out, as the ingress has, leaves it to the replica to keep the deadline it is told."""
        return None if self.retry_policy.timeout is None and self.retry_policy.deadline is None else request.deadline_s

    def _call(self, request: Request, handed_back: HandedBack | None = None, as_ref: bool = False) -> Any:
        told = request if request.client else replace(request, client=_job())
        is_small = not as_ref and self._sizes is not None and self._sizes.is_small(request)
        return self._method(request.verb, is_small).remote(told.to_plain(), handed_back)

    def _method(self, verb: str, is_small: bool) -> Any:
        """The handle of one method, kept: Serve makes one anew each time it is asked."""
        method = self._methods.get((verb, is_small))
        if method is None:
            method = self._methods[verb, is_small] = getattr(self._by_value if is_small else self._handle, verb)
        return method

    def refuse_blocking(self) -> None:
        import ray

        # A Jupyter driver also has a running loop, but nobody else's work waits on it; an async actor's loop serves others.
        if _in_event_loop() and ray.get_runtime_context().get_actor_id() is not None:
            raise BlockingCall("RemoteVAE would block this async actor's event loop; use AsyncRemoteVAE and await it")

    def _wait(self, call: Callable[[], Any], take: Callable[[Any, float | None], T], timeout_s: float | None) -> T:
        self.refuse_blocking()

        def run() -> T:
            response = call()
            with _cancelled_if_given_up(response):
                if (flight := in_flight.current()) is None:
                    return take(response, timeout_s)
                with flight.broken_off_by(response.cancel):
                    return take(response, timeout_s)

        try:
            if not _in_event_loop():
                return run()
            with ThreadPoolExecutor(1) as pool:  # Serve refuses to wait in a thread that has a running loop
                return pool.submit(run).result()
        except Exception as error:
            raise translated(error, timeout_s) from error


class _Rounds:
    """The replicas that one request goes round to.

    Args:
        wait_s: seconds for all of them together; None for ever.
        handed_back: by whom already.
    """

    def __init__(self, wait_s: float | None, handed_back: HandedBack = ()) -> None:
        self._give_up = None if wait_s is None else time.monotonic() + wait_s
        self.handed_back = handed_back

    def left_s(self) -> float | None:
        return None if self._give_up is None else max(self._give_up - time.monotonic(), 0.0)

    def goes_on(self, plain: Any) -> bool:
        """Whether that is no result, but of a replica that has handed the request back."""
        if not (isinstance(plain, tuple) and len(plain) == 2):
            return False
        self.handed_back = (*self.handed_back, plain)
        return True

    def pause_after(self, error: Overloaded) -> float:
        """Seconds to wait where Serve's queue is full for what was let in already. Raises the error of what was not."""
        if not self.handed_back or self.left_s() == 0:
            raise error
        return FULL_PAUSE_S


def _job() -> str:
    """Whose requests they are that come by handle: those of one Ray job share a queue's places."""
    import ray

    return f"job {ray.get_runtime_context().get_job_id()}"


def _result(response: Any, timeout_s: float | None) -> Any:
    return response.result(timeout_s=timeout_s)


async def _await(response: Awaitable[T], timeout_s: float | None) -> T:
    try:
        return await asyncio.wait_for(_coroutine(response), timeout_s)
    except Exception as error:
        raise translated(error, timeout_s) from error


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
        return TimedOut("The model did not answer " + ("in time" if timeout is None else f"within {timeout:.3g} s"))
    if isinstance(cause, BackPressureError):
        return Overloaded("The model's queue is full; try again", retry_after=1)
    if isinstance(cause, DeploymentUnavailableError):
        return Unavailable("The model cannot be deployed; see its Serve status", retry_after=10)
    if isinstance(cause, RayActorError):
        return Unavailable("The replica died in the middle of the request; try again", retry_after=1)
    if isinstance(cause, RayServeException):
        return Unavailable(f"Ray Serve cannot route to the model: {cause}", retry_after=5)
    return InternalError(f"The replica failed: {type(cause).__name__}; its log says more")


def _app_handle(name: str) -> Any:
    """The handle of an application. Raises RayServeException where there is none."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_app_handle(name)
    except RayServeException:
        # While Serve builds an update it has forgotten for seconds which deployment is the application's first; that still runs.
        try:
            return serve.get_deployment_handle(MODEL_DEPLOYMENT, name)
        except KeyError:
            pass
        raise
