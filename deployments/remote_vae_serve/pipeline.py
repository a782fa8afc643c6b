"""A request's way through a replica: unpack and scale | decode | encode. The decoder has a thread of its own, so that
nothing else ever waits on the device; the host's work runs beside it, and the event loop only hands over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from remote_vae.decoding import DecodeRequest
from remote_vae.encoding import EncodeRequest
from remote_vae.errors import DeadlineExceeded
from remote_vae.protocol import Request
from remote_vae.tensors import from_array
from remote_vae.wire import Provenance, Result
from remote_vae_serve import codecs
from remote_vae_serve.engine import Engine, Unpacked

HOST_THREADS = 4


class Pipeline:
    """Runs requests on an engine; call it from one event loop.

    Args:
        engine: loaded.
        model: the name to sign results with.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model
        self._host = ThreadPoolExecutor(HOST_THREADS, thread_name_prefix="host")
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")

    async def answer(self, request: Request) -> Result:
        """Decode or encode, as the request says. Raises RemoteVAEError for what the client can mend."""
        return await (self.decode(request) if isinstance(request, DecodeRequest) else self.encode(request))

    async def decode(self, request: DecodeRequest) -> Result:
        """Decode one request. Raises RemoteVAEError for what the client can mend."""
        loop = asyncio.get_running_loop()
        received = time.perf_counter()
        unpacked = await loop.run_in_executor(self._host, self._engine.unpack, request)
        # Cancelled while it waits (its client left), a request never reaches the device: the executor drops its future.
        decode = partial(self._engine.decode, unpacked.latents)
        pixels, started, ended = await loop.run_in_executor(self._device, _timed, decode, request.deadline_s, received)
        result = await loop.run_in_executor(self._host, self._write, pixels, unpacked, request)
        stages = ("queue", received, started), ("decode", started, ended), ("encode", ended, time.perf_counter())
        return self._signed(result, self._engine.dtype, stages)

    async def encode(self, request: EncodeRequest) -> Result:
        """Encode one request. Raises RemoteVAEError for what the client can mend."""
        loop = asyncio.get_running_loop()
        received = time.perf_counter()
        prepared = await loop.run_in_executor(self._host, self._engine.prepare, request)
        generator = None if request.seed is None else torch.Generator("cpu").manual_seed(request.seed)
        encode = partial(self._engine.encode, prepared.pixels, request.sample_mode, generator)
        latents, started, ended = await loop.run_in_executor(self._device, _timed, encode, request.deadline_s, received)
        raw = from_array(await loop.run_in_executor(self._host, self._engine.pack, latents, prepared, request))
        stages = ("queue", received, started), ("encode", started, ended)
        return self._signed(Result("tensor/binary", raw.data, raw.dtype, raw.shape), self._engine.encode_dtype, stages)

    def _signed(self, result: Result, dtype: torch.dtype, stages: Iterable[tuple[str, float, float]]) -> Result:
        timings = tuple((stage, (end - start) * 1000) for stage, start, end in stages)
        name = str(dtype).removeprefix("torch.")
        return replace(result, provenance=Provenance(self._model, self._engine.revision, name, timings))

    def _write(self, pixels: torch.Tensor, unpacked: Unpacked, request: DecodeRequest) -> Result:
        fps = request.fps or self._engine.space.family.fps
        return codecs.write(unpacked.layout.repack(pixels, unpacked.shape), request.output, fps)

    def close(self) -> None:
        for pool in (self._host, self._device):
            pool.shutdown(wait=False, cancel_futures=True)


def _timed(
    run: Callable[[], torch.Tensor], deadline_s: float | None, received: float
) -> tuple[torch.Tensor, float, float]:
    """On the device's thread: what `run` gives, on the host, and when it began and ended. Raises DeadlineExceeded where
    nobody waits for it any more."""
    started = time.perf_counter()
    if deadline_s is not None and started - received > deadline_s:
        raise DeadlineExceeded(
            f"The request waited for the model longer than the {deadline_s:.3g} s its client gives it"
        )
    return run().cpu(), started, time.perf_counter()
