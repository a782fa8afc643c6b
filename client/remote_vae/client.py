"""The blocking client: `remote_decode`, `remote_encode`, `RemoteVAE`, thin shells. Arguments and results are in `calls`, the way
there and back in `transports`. `AsyncRemoteVAE` is in `async_client`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from remote_vae.calls.call import ask
from remote_vae.calls.decode_call import DecodeCall, Decoded, ImageFormat, OutputType
from remote_vae.calls.encode_call import Encodable, EncodeCall, Mode
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.messages import Transfer
from remote_vae.transports.endpoint import transport_to
from remote_vae.transports.handle import HandleTransport
from remote_vae.transports.http import HttpTransport, PerProcess
from remote_vae.transports.retry import DEFAULT_TIMEOUT, RetryPolicy, Timeout
from remote_vae.transports.transport import IN_FLIGHT
from remote_vae.transports.waiting import OnWait

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    import torch
    from typing_extensions import Unpack

    from remote_vae.autoencoder.remote_autoencoder import RemoteAutoencoder
    from remote_vae.protocol.hints import EncodeHintArguments, HintArguments
    from remote_vae.protocol.model_description import ModelDescription

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
    deadline: float | None = None,
    retries: int | None = None,
    token: str | None = None,
    fallback: Any = None,
    wire_dtype: str | None = None,
    on_wait: OnWait | None = None,
    as_ref: bool = False,
    **hints: Unpack[HintArguments],
) -> Decoded:
    """Decode latents on a server: the call of the Hugging Face helper.

    Args:
        endpoint: URL of a model (`http://host:8000/sd-v1`), or a Ray Serve handle of one (`serve.get_app_handle`).
        as_ref: through a handle only: return the Ray ObjectRef of the result (`open_result` reads it).
        hints: what the shape and the model's config do not tell, such as `num_frames`: the names and meanings of `hints.Hints`.

    `timeout` to `on_wait` are those of `RemoteVAE`, the other arguments those of `DecodeCall`.

    Returns:
        A PIL image (a list of them for several), a tensor in kind with `tensor`, or the bytes of an mp4.

    Raises:
        RemoteVAEError: see `errors`.

    Example:
        >>> image = remote_decode("http://127.0.0.1:8000/demo", torch.randn(1, 16, 32, 32))  # doctest: +SKIP
    """
    with RemoteVAE(endpoint, timeout=timeout, deadline=deadline, retries=retries, token=token, fallback=fallback,
                   wire_dtype=wire_dtype, on_wait=on_wait) as vae:  # fmt: skip
        return vae.decode(
            tensor, processor=processor, do_scaling=do_scaling, scaling_factor=scaling_factor, shift_factor=shift_factor,
            output_type=output_type, return_type=return_type, image_format=image_format,
            partial_postprocess=partial_postprocess, input_tensor_type=input_tensor_type,
            output_tensor_type=output_tensor_type, height=height, width=width, fps=fps, as_ref=as_ref, **hints,
        )  # fmt: skip


def remote_encode(
    endpoint: Any,
    image: Encodable,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    *,
    do_scaling: bool = False,
    sample_mode: Mode = "sample",
    seed: int | None = None,
    timeout: Timeout = DEFAULT_TIMEOUT,
    deadline: float | None = None,
    retries: int | None = None,
    token: str | None = None,
    fallback: Any = None,
    wire_dtype: str | None = None,
    on_wait: OnWait | None = None,
    **hints: Unpack[EncodeHintArguments],
) -> Tensor:
    """Encode a picture, pictures or a video on a server: the call of the Hugging Face helper, and more.

    Args:
        endpoint: URL of a model (`http://host:8000/sd-v1`), or a Ray Serve handle of one.
        hints: what the picture and the model's config do not tell: the names and meanings of `hints.Hints`.

    `timeout` to `on_wait` are those of `RemoteVAE`, the other arguments those of `EncodeCall`.

    Returns:
        Latents `[B, C, h, w]` or `[B, C, T, h, w]`: torch where torch was handed in or is imported anyway, else numpy.

    Raises:
        RemoteVAEError: see `errors`.
    """
    with RemoteVAE(endpoint, timeout=timeout, deadline=deadline, retries=retries, token=token, fallback=fallback,
                   wire_dtype=wire_dtype, on_wait=on_wait) as vae:  # fmt: skip
        return vae.encode(
            image, scaling_factor, shift_factor, do_scaling=do_scaling, sample_mode=sample_mode, seed=seed, **hints
        )


def list_models(server: str, *, timeout: Timeout = DEFAULT_TIMEOUT, retries: int | None = None,
                token: str | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """What a server (`http://host:8000`) says of each of its models; starts none of them. Raises RemoteVAEError."""
    transport = HttpTransport(server, RetryPolicy(timeout, retries=retries), token=token)
    try:
        return [model.to_plain() for model in transport.describe_models()]
    finally:
        transport.close()


class RemoteVAE:
    """A model on a server. Thread-safe; close it, or use it in a `with`, to give its connections back. A pickle of it has what it
    was made of, the token too, and opens connections of its own.

    Args:
        endpoint: URL of a model, or a Ray Serve handle of one.
        timeout: seconds for one try, or (connect, answer); None waits for ever.
        deadline: seconds for all tries of a call and the pauses between; the server hears of it, and drops what nobody
            waits for.
        retries: how often a call is tried again where the server is overloaded, starting, or cannot be reached; None is 3 times
            or, with a deadline, until it.
        token: of the server, where it asks for one.
        fallback: a local autoencoder of diffusers, which decodes what the server could not; a warning is logged.
        wire_dtype: dtype in which latents and float pixels travel; None for their own.
        workers: how many decodes `submit` and `map` keep in flight.
        on_wait: told what a call waits for, a `Waiting`, several times a second, in the thread that waits. What it raises, such
            as `errors.Cancelled`, ends the call within a second, and the server drops the work.
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
        self._made_of = (endpoint, timeout, deadline, retries, token, fallback, wire_dtype, workers, on_wait)
        self._transport = transport_to(endpoint, RetryPolicy(timeout, deadline, retries), workers, token, fallback)
        self._wire_dtype = wire_dtype
        self._on_wait = on_wait
        self._workers = workers
        self._pool = PerProcess(lambda: ThreadPoolExecutor(workers, thread_name_prefix="remote-vae"))

    @classmethod
    def from_app(cls, name: str, *, timeout: Timeout = DEFAULT_TIMEOUT, deadline: float | None = None,
                 retries: int | None = None, **options: Any) -> RemoteVAE:  # fmt: skip
        """The model that the Ray Serve application `name` of this cluster serves, without HTTP; options as above."""
        return cls(HandleTransport.of_app(name, RetryPolicy(timeout, deadline, retries)), **options)

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
        **hints: Unpack[HintArguments],
    ) -> Decoded:
        """Decode and wait: see `remote_decode`."""
        call = DecodeCall(
            tensor=tensor, processor=processor, do_scaling=do_scaling, scaling_factor=scaling_factor, shift_factor=shift_factor,
            output_type=output_type, return_type=return_type, image_format=image_format,
            partial_postprocess=partial_postprocess, input_tensor_type=input_tensor_type,
            output_tensor_type=output_tensor_type, height=height, width=width, fps=fps, wire_dtype=self._wire_dtype,
            hints=Hints.of_arguments(hints),
        )  # fmt: skip
        if as_ref:
            return self._transport.send_ref(call.only_request())
        return ask(self._transport, call, self._on_wait)

    def encode(
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
        """Encode and wait: see `remote_encode`."""
        call = EncodeCall(
            image=image, scaling_factor=scaling_factor, shift_factor=shift_factor, do_scaling=do_scaling,
            sample_mode=sample_mode, seed=seed, wire_dtype=self._wire_dtype, hints=Hints.of_arguments(hints),
        )  # fmt: skip
        return ask(self._transport, call, self._on_wait)

    def as_autoencoder(self) -> RemoteAutoencoder:
        """What a diffusers pipeline takes for its `vae`, without weights: `pipe.vae = RemoteVAE(url).as_autoencoder()`. The
        server is asked now what the model is, and a model that sleeps is woken. Raises RemoteVAEError."""
        from remote_vae.autoencoder.remote_autoencoder import RemoteAutoencoder  # knows diffusers

        return RemoteAutoencoder(self)

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

    def describe(self, wake: bool = False) -> dict[str, Any]:
        """What the server says of the model: state, source, dtype, family; once a replica has run, its config.

        Args:
            wake: start a replica where there is none, to hear all of it. Through a handle that is always so.
        """
        return self.description(wake).to_plain()

    def description(self, wake: bool = False) -> ModelDescription:
        """What `describe` says, with a type for each field."""
        return self._transport.description(wake, self._on_wait)

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_of, self._made_of

    def close(self) -> None:
        """Wait for what is being decoded, cancel what has not begun, and give the connections back."""
        self._pool.close(lambda pool: pool.shutdown(wait=True, cancel_futures=True))
        self._transport.close()

    def __enter__(self) -> RemoteVAE:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _made_of(
    endpoint: Any, timeout: Timeout, deadline: float | None, retries: int | None, token: str | None, fallback: Any,
    wire_dtype: str | None, workers: int, on_wait: OnWait | None,
) -> RemoteVAE:  # fmt: skip
    """Of a pickle."""
    return RemoteVAE(
        endpoint, timeout=timeout, deadline=deadline, retries=retries, token=token, fallback=fallback, wire_dtype=wire_dtype,
        workers=workers, on_wait=on_wait,
    )  # fmt: skip
