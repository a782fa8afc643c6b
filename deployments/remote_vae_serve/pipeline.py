"""A request's way through a replica: unpack and scale | decode | encode. The decoder has a thread of its own, so that
nothing else ever waits on the device; the host's work runs beside it, and the event loop only hands over."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from remote_vae.wire import DecodeRequest, Provenance, Result
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

    async def decode(self, request: DecodeRequest) -> Result:
        """Decode one request. Raises RemoteVAEError for what the client can mend."""
        loop = asyncio.get_running_loop()
        received = time.perf_counter()
        unpacked = await loop.run_in_executor(self._host, self._engine.unpack, request)
        # Cancelled while it waits (its client left), a request never reaches the device: the executor drops its future.
        pixels, started, ended = await loop.run_in_executor(self._device, self._decode, unpacked.latents)
        result = await loop.run_in_executor(self._host, self._write, pixels, unpacked, request)
        timings = (
            ("queue", _ms(received, started)),
            ("decode", _ms(started, ended)),
            ("encode", _ms(ended, time.perf_counter())),
        )
        dtype = str(self._engine.dtype).removeprefix("torch.")
        return replace(result, provenance=Provenance(self._model, self._engine.revision, dtype, timings))

    def _decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        started = time.perf_counter()
        pixels = self._engine.decode(latents).cpu()
        return pixels, started, time.perf_counter()

    def _write(self, pixels: torch.Tensor, unpacked: Unpacked, request: DecodeRequest) -> Result:
        fps = request.fps or self._engine.space.family.fps
        return codecs.write(unpacked.layout.repack(pixels, unpacked.shape), request.output, fps)

    def close(self) -> None:
        for pool in (self._host, self._device):
            pool.shutdown(wait=False, cancel_futures=True)


def _ms(start: float, end: float) -> float:
    return (end - start) * 1000
