"""A request's way through a replica: unpack and scale | decode | encode, three stages side by side. While one request is in the
codec, the next is on the device and a third is being unpacked; the event loop only hands over.

The queues between the stages are as short as Serve makes them: `max_ongoing_requests` bounds what is in all three.
"""

from __future__ import annotations

import asyncio
import math
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from remote_vae.decoding import DecodeRequest
from remote_vae.encoding import EncodeRequest
from remote_vae.hints import Hints
from remote_vae.protocol import Request
from remote_vae.tensors import from_array
from remote_vae.wire import Provenance, Result
from remote_vae_serve import codecs
from remote_vae_serve.device import Device, Job
from remote_vae_serve.engine import Decoded, Encoded, Engine, Unpacked
from remote_vae_serve.layouts import Said
from remote_vae_serve.pace import Pace
from remote_vae_serve.shelf import Shelf
from remote_vae_serve.tiling import Plan
from remote_vae_serve.transfer import HostCopy

T = TypeVar("T")
UNPACKERS = 2
WRITERS = 4  # they let go of the GIL
BUSY_S, BUSY_FACTOR = 0.25, 4
INLINE = 2**18
"""Bytes of latents that are unpacked at once, in a tenth of a millisecond: handing them to a thread and back takes longer.
Not those of a shape that is new: how much memory it takes is yet to be found out, in a thread."""
MOST_SHAPES = 1024


class Pipeline:
    """Runs requests on an engine; call it from one event loop.

    Args:
        engine: loaded.
        model: the name to sign results with.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model
        self._unpackers = ThreadPoolExecutor(UNPACKERS, thread_name_prefix="unpack")
        self._device = Device(engine.on_device, engine.rest)
        self._decodes, self._encodes = Pace(), Pace()
        self._familiar: set[tuple[tuple[int, ...], int | None, int | None, Hints]] = set()
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._shelf = Shelf()
        engine.make_room = self._shelf.wait

    async def answer(self, request: Request) -> Result:
        """Decode or encode, as the request says. Raises RemoteVAEError for what the client can mend."""
        try:
            return await (self.decode(request) if isinstance(request, DecodeRequest) else self.encode(request))
        except BaseException as error:
            # Its frames hold a job that holds the error: with all their tensors they would wait for the garbage collector.
            traceback.clear_frames(error.__traceback__)
            raise

    async def decode(self, request: DecodeRequest) -> Result:
        """Decode one request. Raises RemoteVAEError for what the client can mend."""
        received = time.perf_counter()
        unpacked = await self._unpack(request)

        def leave(pixels: torch.Tensor, decoded: Decoded) -> tuple[HostCopy, Decoded]:
            left = self._engine.leave(unpacked.layout.repack(pixels, unpacked.shape, unpacked.said), request.output)
            # A slice of no length would keep all of the pixels there.
            return self._copied(left), replace(decoded, pixels=pixels.new_empty(0))

        shape, plan = tuple(unpacked.latents.shape), unpacked.plan
        job = Job(
            unpacked.latents,
            partial(_decode, self._engine.decode, plan, unpacked.said),
            leave,
            self._decodes,
            group=(shape[1:], plan, unpacked.said),
            limit=unpacked.group_limit,
            give_up=_give_up(request, received),
            run_together=partial(_decode, self._engine.decode_together, plan, unpacked.said),
        )
        (copy, decoded), began, ended = await self._run(job)
        as_it_is = copy.is_here and request.output.media_type == "tensor/binary"
        result = self._write(copy, request) if as_it_is else await _on(self._writers, self._write, copy, request)
        stages = ("queue", received, began), ("decode", began, ended), ("encode", ended, time.perf_counter())
        return self._signed(result, decoded.dtype, stages, tiling=str(decoded.plan))

    async def encode(self, request: EncodeRequest) -> Result:
        """Encode one request. Raises RemoteVAEError for what the client can mend."""
        received = time.perf_counter()
        prepared = await _on(self._unpackers, self._engine.prepare, request)
        generator = None if request.seed is None else torch.Generator("cpu").manual_seed(request.seed)

        def run(pixels: torch.Tensor) -> tuple[torch.Tensor, Encoded]:
            encoded = self._engine.encode_by(prepared.plan, pixels, request.sample_mode, generator)
            return encoded.latents, encoded

        def leave(latents: torch.Tensor, encoded: Encoded) -> tuple[HostCopy, Encoded]:
            return self._copied(latents), replace(encoded, latents=latents.new_empty(0))

        job = Job(prepared.pixels, run, leave, self._encodes, give_up=_give_up(request, received))
        (copy, encoded), began, ended = await self._run(job)
        raw = from_array(await _on(self._writers, lambda: self._engine.pack(copy.whole(), prepared, request)))
        result = Result("tensor/binary", raw.data, raw.dtype, raw.shape)
        stages = ("queue", received, began), ("encode", began, ended)
        return self._signed(result, encoded.dtype, stages, tiling=str(encoded.plan))

    def is_busy_for(self, request: Request) -> bool:
        """Whether the request would wait here for long, by its own measure: another replica may have it at once."""
        if isinstance(request, DecodeRequest):
            own_s = self._decodes.predict(math.prod(request.latents.shape))
        else:
            own_s = self._encodes.predict(math.prod(request.image.shape))
        return self._device.wait_s() > max(BUSY_S, BUSY_FACTOR * own_s)

    async def _unpack(self, request: DecodeRequest) -> Unpacked:
        # Packed latents of one shape are many pictures, and hints move what a decode takes.
        hints = request.hints if request.hints.seed is None else replace(request.hints, seed=None)
        shape = (request.latents.shape, request.height, request.width, hints)
        if shape in self._familiar and request.latents.data.nbytes <= INLINE:
            return self._engine.unpack(request)
        unpacked = await _on(self._unpackers, self._engine.unpack, request)
        if len(self._familiar) < MOST_SHAPES:
            self._familiar.add(shape)
        return unpacked

    def close(self) -> None:
        self._device.close()
        for pool in (self._unpackers, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _copied(self, left: torch.Tensor) -> HostCopy:
        """On its way to the host, and counted until it is gone."""
        left = left.contiguous()  # or the copy would be of another storage
        self._shelf.put(left)
        return HostCopy(left)

    async def _run(self, job: Job) -> tuple[Any, float, float]:
        """Cancelled while it waits (its client left), a job never runs: it is its future that is cancelled."""
        self._device.submit(job)
        return await asyncio.wrap_future(job.done)

    def _write(self, pixels: HostCopy, request: DecodeRequest) -> Result:
        return codecs.write(pixels, request.output, request.fps or self._engine.space.family.fps)

    def _signed(
        self, result: Result, dtype: torch.dtype, stages: Iterable[tuple[str, float, float]], tiling: str = ""
    ) -> Result:
        timings = tuple((stage, (end - start) * 1000) for stage, start, end in stages)
        name = str(dtype).removeprefix("torch.")
        return replace(result, provenance=Provenance(self._model, self._engine.revision, name, timings, tiling))


def _decode(
    decode: Callable[[torch.Tensor, Plan, Said], Decoded], plan: Plan, said: Said, latents: torch.Tensor
) -> tuple[torch.Tensor, Decoded]:
    decoded = decode(latents, plan, said)
    return decoded.pixels, decoded


async def _on(pool: ThreadPoolExecutor, run: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, run, *arguments)


def _give_up(request: Request, received: float) -> float | None:
    return None if request.deadline_s is None else received + request.deadline_s
