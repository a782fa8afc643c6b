"""`AsyncRemoteVAE`: `RemoteVAE` for `async` code."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

from remote_vae.calls.call import ask_async
from remote_vae.calls.decode_call import DecodeCall, Decoded, ImageFormat, OutputType
from remote_vae.calls.encode_call import Encodable, EncodeCall, Mode
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.messages import Transfer
from remote_vae.transports.endpoint import transport_to
from remote_vae.transports.handle import HandleTransport
from remote_vae.transports.retry import DEFAULT_TIMEOUT, RetryPolicy, Timeout
from remote_vae.transports.transport import IN_FLIGHT
from remote_vae.transports.waiting import OnWait

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from remote_vae.client import Tensor
    from remote_vae.protocol.hints import EncodeHintArguments, HintArguments
    from remote_vae.protocol.model_description import ModelDescription


class AsyncRemoteVAE:
    """`RemoteVAE` for `async` code: the same names and arguments, nothing blocks the event loop.

    A cancelled decode is dropped by the server too.

    Args:
        as for `RemoteVAE`; `on_wait` is called on the event loop.
    """

    def __init__(
        self,
        endpoint: Any,
        *,
        timeout: Timeout = DEFAULT_TIMEOUT,
        deadline: float | None = None,
        retries: int | None = None,
        token: str | None = None,
        fallback: Any = None,
        wire_dtype: str | None = None,
        workers: int = IN_FLIGHT,
        on_wait: OnWait | None = None,
    ) -> None:
        self._transport = transport_to(endpoint, RetryPolicy(timeout, deadline, retries), workers, token, fallback)
        self._wire_dtype = wire_dtype
        self._on_wait = on_wait
        self._workers = workers

    @classmethod
    def from_app(cls, name: str, *, timeout: Timeout = DEFAULT_TIMEOUT, deadline: float | None = None,
                 retries: int | None = None, **options: Any) -> AsyncRemoteVAE:  # fmt: skip
        """The model that the Ray Serve application `name` of this cluster serves, without HTTP; options as above."""
        return cls(HandleTransport.of_app(name, RetryPolicy(timeout, deadline, retries)), **options)

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
        **hints: Unpack[HintArguments],
    ) -> Decoded:
        """Decode: see `remote_decode`."""
        call = DecodeCall(
            tensor=tensor, processor=processor, do_scaling=do_scaling, scaling_factor=scaling_factor, shift_factor=shift_factor,
            output_type=output_type, return_type=return_type, image_format=image_format,
            partial_postprocess=partial_postprocess, input_tensor_type=input_tensor_type,
            output_tensor_type=output_tensor_type, height=height, width=width, fps=fps, wire_dtype=self._wire_dtype,
            hints=Hints.of_arguments(hints),
        )  # fmt: skip
        if as_ref:
            return await self._transport.send_ref_async(await asyncio.to_thread(call.only_request))
        return await ask_async(self._transport, call, self._on_wait)

    async def encode(
        self,
        image: Encodable,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        *,
        do_scaling: bool = False,
        sample_mode: Mode = "sample",
        seed: int | None = None,
        **hints: Unpack[EncodeHintArguments],
    ) -> Tensor:
        """Encode: see `remote_encode`."""
        call = EncodeCall(
            image=image, scaling_factor=scaling_factor, shift_factor=shift_factor, do_scaling=do_scaling,
            sample_mode=sample_mode, seed=seed, wire_dtype=self._wire_dtype, hints=Hints.of_arguments(hints),
        )  # fmt: skip
        return await ask_async(self._transport, call, self._on_wait)

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

    async def describe(self, wake: bool = False) -> dict[str, Any]:
        """What the server says of the model; see `RemoteVAE.describe`."""
        return (await self.description(wake)).to_plain()

    async def description(self, wake: bool = False) -> ModelDescription:
        """What `describe` says, with a type for each field."""
        return await self._transport.description_async(wake, self._on_wait)

    async def close(self) -> None:
        self._transport.close()

    async def __aenter__(self) -> AsyncRemoteVAE:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
