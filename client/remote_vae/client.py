"""`remote_decode`, `RemoteVAE`, `AsyncRemoteVAE`: thin shells. What is said and what comes back is in `calls`, the way
there and back in `transports` and `handles`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from remote_vae.calls import DecodeCall, Decoded, ImageFormat, OutputType
from remote_vae.errors import BadRequest
from remote_vae.handles import HandleTransport
from remote_vae.transports import DEFAULT_TIMEOUT, IN_FLIGHT, HttpTransport, PerProcess, Timeout, Transport
from remote_vae.wire import Transfer

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    import torch

    Tensor: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"


def remote_decode(
    endpoint: Any,
    tensor: Tensor,
    processor: Any = None,
    do_scaling: bool = True,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    output_type: OutputType = "pil",
    return_type: OutputType | None = None,
    image_format: ImageFormat = "jpg",
    partial_postprocess: bool = False,
    input_tensor_type: Transfer = "binary",
    output_tensor_type: Transfer = "binary",
    height: int | None = None,
    width: int | None = None,
    *,
    fps: float | None = None,
    timeout: Timeout = DEFAULT_TIMEOUT,
    as_ref: bool = False,
) -> Decoded:
    """Decode latents on a server: the call of the Hugging Face helper.

    Args:
        endpoint: URL of a model (`http://host:8000/sd-v1`), or a Ray Serve handle of one (`serve.get_app_handle`).
        timeout: seconds for the whole, or (connect, answer); None waits for ever.
        as_ref: through a handle only: return the Ray ObjectRef of the result (`open_result` reads it).

    The other arguments are those of `calls.DecodeCall`.

    Returns:
        A PIL image (a list of them for several), a tensor in kind with `tensor`, or the bytes of an mp4.

    Raises:
        RemoteVAEError: see `errors`.

    Example:
        >>> image = remote_decode("http://127.0.0.1:8000/demo", torch.randn(1, 16, 32, 32))  # doctest: +SKIP
    """
    with RemoteVAE(endpoint, timeout=timeout) as vae:
        return vae.decode(
            tensor, processor, do_scaling, scaling_factor, shift_factor, output_type, return_type, image_format,
            partial_postprocess, input_tensor_type, output_tensor_type, height, width, fps=fps, as_ref=as_ref,
        )  # fmt: skip


def transport_to(endpoint: Any, timeout: Timeout, connections: int) -> Transport:
    """The transport for a URL or a Ray Serve handle; a Transport is taken as it is."""
    if isinstance(endpoint, Transport):
        return endpoint
    if isinstance(endpoint, str):
        return HttpTransport(endpoint, timeout, connections)
    if hasattr(endpoint, "remote") and hasattr(endpoint, "options"):
        return HandleTransport(endpoint, timeout)
    raise BadRequest(
        f"endpoint is a {type(endpoint).__name__}; expected a URL or a Ray Serve deployment handle",
        parameter="endpoint",
    )


class RemoteVAE:
    """A model on a server. Thread-safe; close it, or use it in a `with`, to give its connections back.

    Args:
        endpoint: URL of a model, or a Ray Serve handle of one.
        timeout: seconds for the whole, or (connect, answer); None waits for ever.
        workers: how many decodes `submit` and `map` keep in flight.
    """

    def __init__(self, endpoint: Any, *, timeout: Timeout = DEFAULT_TIMEOUT, workers: int = IN_FLIGHT) -> None:
        self._transport = transport_to(endpoint, timeout, workers)
        self._workers = workers
        self._pool = PerProcess(lambda: ThreadPoolExecutor(workers, thread_name_prefix="remote-vae"))

    @classmethod
    def from_app(cls, name: str, *, timeout: Timeout = DEFAULT_TIMEOUT, workers: int = IN_FLIGHT) -> RemoteVAE:
        """The model that the Ray Serve application `name` of this cluster serves, without HTTP."""
        return cls(HandleTransport.of_app(name, timeout), workers=workers)

    def decode(
        self,
        tensor: Tensor,
        processor: Any = None,
        do_scaling: bool = True,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        output_type: OutputType = "pil",
        return_type: OutputType | None = None,
        image_format: ImageFormat = "jpg",
        partial_postprocess: bool = False,
        input_tensor_type: Transfer = "binary",
        output_tensor_type: Transfer = "binary",
        height: int | None = None,
        width: int | None = None,
        *,
        fps: float | None = None,
        as_ref: bool = False,
    ) -> Decoded:
        """Decode and wait: see `remote_decode`."""
        call = DecodeCall(
            tensor, processor, do_scaling, scaling_factor, shift_factor, output_type, return_type, image_format,
            partial_postprocess, input_tensor_type, output_tensor_type, height, width, fps,
        )  # fmt: skip
        if as_ref:
            return self._transport.send_ref(_only(call))
        return call.answer(self._transport.send(call.requests()))

    def submit(self, tensor: Tensor, *args: Any, **options: Any) -> Future[Decoded]:
        """`decode` in the background; takes what `decode` takes."""
        return self._pool.get().submit(self.decode, tensor, *args, **options)

    def map(self, tensors: Iterable[Tensor], *args: Any, **options: Any) -> Iterator[Decoded]:
        """`decode` over many latents, in order, at most `workers` in flight: the next is taken when one is done."""
        pending: deque[Future[Decoded]] = deque()
        try:
            for tensor in tensors:
                if len(pending) == self._workers:
                    yield pending.popleft().result()
                pending.append(self.submit(tensor, *args, **options))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def describe(self) -> dict[str, Any]:
        """What the server says of the model: state, source, dtype, family. Over HTTP it never starts a replica."""
        return self._transport.describe()

    def close(self) -> None:
        self._pool.get().shutdown(wait=True, cancel_futures=True)
        self._transport.close()

    def __enter__(self) -> RemoteVAE:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncRemoteVAE:
    """`RemoteVAE` for `async` code: the same names and arguments, nothing blocks the event loop.

    A cancelled decode is cancelled on the replica too where it goes through a handle. Over HTTP it keeps one of its threads
    until its answer or its time-out comes.

    Args:
        endpoint, timeout, workers: as for `RemoteVAE`.
    """

    def __init__(self, endpoint: Any, *, timeout: Timeout = DEFAULT_TIMEOUT, workers: int = IN_FLIGHT) -> None:
        self._transport = transport_to(endpoint, timeout, workers)
        self._workers = workers

    @classmethod
    def from_app(cls, name: str, *, timeout: Timeout = DEFAULT_TIMEOUT, workers: int = IN_FLIGHT) -> AsyncRemoteVAE:
        """The model that the Ray Serve application `name` of this cluster serves, without HTTP."""
        return cls(HandleTransport.of_app(name, timeout), workers=workers)

    async def decode(
        self,
        tensor: Tensor,
        processor: Any = None,
        do_scaling: bool = True,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        output_type: OutputType = "pil",
        return_type: OutputType | None = None,
        image_format: ImageFormat = "jpg",
        partial_postprocess: bool = False,
        input_tensor_type: Transfer = "binary",
        output_tensor_type: Transfer = "binary",
        height: int | None = None,
        width: int | None = None,
        *,
        fps: float | None = None,
        as_ref: bool = False,
    ) -> Decoded:
        """Decode: see `remote_decode`."""
        call = DecodeCall(
            tensor, processor, do_scaling, scaling_factor, shift_factor, output_type, return_type, image_format,
            partial_postprocess, input_tensor_type, output_tensor_type, height, width, fps,
        )  # fmt: skip
        if as_ref:
            return await self._transport.send_ref_async(_only(call))
        return call.answer(await self._transport.send_async(call.requests()))

    async def submit(self, tensor: Tensor, *args: Any, **options: Any) -> asyncio.Task[Decoded]:
        """Start a `decode` in the background; await the task for its result."""
        return asyncio.create_task(self.decode(tensor, *args, **options))

    async def map(self, tensors: Iterable[Tensor], *args: Any, **options: Any) -> AsyncIterator[Decoded]:
        """`decode` over many latents, in order, at most `workers` in flight."""
        pending: deque[asyncio.Task[Decoded]] = deque()
        try:
            for tensor in tensors:
                if len(pending) == self._workers:
                    yield await pending.popleft()
                pending.append(await self.submit(tensor, *args, **options))
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()

    async def describe(self) -> dict[str, Any]:
        """What the server says of the model; over HTTP it never starts a replica."""
        return await self._transport.describe_async()

    async def close(self) -> None:
        self._transport.close()

    async def __aenter__(self) -> AsyncRemoteVAE:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _only(call: DecodeCall) -> Any:
    requests = call.requests()
    if len(requests) > 1:
        raise BadRequest(
            "as_ref=True hands on one result, and a batch of images is one result each; "
            "use output_type='pt', or decode the samples one by one",
            parameter="as_ref",
        )
    return requests[0]
