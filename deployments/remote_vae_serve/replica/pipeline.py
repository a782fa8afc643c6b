"""`Pipeline`: a request's way through a replica: unpack and scale | decode | encode as a file, three stages side by side.

While one request is in the codec, the next is on the device and a third is being unpacked; the event loop only hands over. The
queues between the stages are as short as Serve makes them: `max_ongoing_requests` bounds what is in all three.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch

from remote_vae import errors
from remote_vae.errors import DeadlineExceeded
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Provenance, Result
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.codecs import codecs
from remote_vae_serve.engine.base import Computed, Engine
from remote_vae_serve.engine.tiling import TilingPlan
from remote_vae_serve.processing.latent_processor import Unpacked
from remote_vae_serve.processing.preprocess import Prepared
from remote_vae_serve.replica.announcements import Announcements
from remote_vae_serve.replica.device_job import Job
from remote_vae_serve.replica.device_worker import TOO_LATE, DeviceWorker
from remote_vae_serve.replica.health import being_replaced
from remote_vae_serve.replica.latency import LatencyEstimator

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
        probe: as for `DeviceWorker`.
    """

    def __init__(self, engine: Engine, model: str, probe: Callable[[], str | None] = lambda: None) -> None:
        self._engine = engine
        self._processor = engine.processor
        self._model = model
        self._unpackers = ThreadPoolExecutor(UNPACKERS, thread_name_prefix="unpack")
        self._worker = DeviceWorker(engine.on_device, engine.on_idle, probe, engine.abandonment.unless)
        self._announcements = Announcements(engine)
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._decodes, self._encodes = LatencyEstimator(), LatencyEstimator()
        self._familiar: set[tuple[tuple[int, ...], int | None, int | None, Hints]] = set()

    async def answer(self, request: Request) -> Result:
        """Decode or encode, as the request says. Raises RemoteVAEError for what the client can mend."""
        try:
            return await (self.decode(request) if isinstance(request, DecodeRequest) else self.encode(request))
        except BaseException as error:
            errors.let_go_of_frames(error)  # they hold a job that holds the error, and all their tensors
            raise

    async def decode(self, request: DecodeRequest) -> Result:
        """Decode one request. Raises RemoteVAEError for what the client can mend."""
        received = time.perf_counter()
        give_up = _give_up(request.deadline_s, received)
        unpacked, plan, limit = await self._unpack(request)
        engine, hints, output = self._engine, unpacked.hints, request.output
        job = Job(
            unpacked.latents,
            run=lambda latents: engine.decode(latents, plan, hints).parts,
            run_together=lambda latents: engine.decode_together(latents, plan, hints).parts,
            finish=lambda pixels: engine.pending.to_host(self._processor.postprocess_pixels(pixels, unpacked, output)),
            latency=self._decodes,
            batch_key=(unpacked.latents.shape[1:], plan, hints),
            batch_limit=limit,
            give_up=give_up,
            client=request.client,
        )
        done = await self._worker.run(job)
        _check_deadline(give_up)
        fps = request.fps or engine.space.family.fps
        if done.output.is_here and output.media_type == "tensor/binary":
            result = codecs.write(done.output, output, fps)
        else:
            result = await _on(self._writers, codecs.write, done.output, output, fps)
        stages = [("queue", received, done.began), ("decode", done.began, done.ended)]
        stages.append(("encode", done.ended, time.perf_counter()))
        return replace(result, provenance=self._provenance(done.note, stages))

    async def encode(self, request: EncodeRequest) -> Result:
        """Encode one request. Raises RemoteVAEError for what the client can mend."""
        received = time.perf_counter()
        give_up = _give_up(request.deadline_s, received)
        prepared, plan = await _on(self._unpackers, self._prepared, request)
        engine, mode = self._engine, request.sample_mode
        generator = None if request.seed is None else torch.Generator("cpu").manual_seed(request.seed)
        job = Job(
            prepared.pixels,
            run=lambda pixels: engine.encode(pixels, mode, generator, plan).parts,
            finish=engine.pending.to_host,
            latency=self._encodes,
            give_up=give_up,
            client=request.client,
        )
        done = await self._worker.run(job)
        _check_deadline(give_up)
        raw = await _on(
            self._writers,
            lambda: from_array(self._processor.pack_latents(done.output.whole(), prepared, request)),
        )
        stages = [("queue", received, done.began), ("encode", done.began, done.ended)]
        provenance = self._provenance(done.note, stages)
        return Result("tensor/binary", raw.data, raw.dtype, raw.shape, provenance)

    async def announce(self, request: Request) -> float:
        """Seconds at least until a request whose bytes have not come yet would have its turn. Raises BadRequest where it would be
        refused for its shape, its hints or the memory that it takes."""
        if self._worker.fault is not None:
            raise being_replaced()
        await self._announcements.check(request)
        return self._worker.least_wait_s(request.client)

    def long_wait_s(self, request: Request) -> float | None:
        """Seconds that the request would wait here, where that is long by its own measure, so that it may be better off at
        another replica; None where it is not."""
        if isinstance(request, DecodeRequest):
            own_s = self._decodes.predict(math.prod(request.latents.shape))
        else:
            own_s = self._encodes.predict(math.prod(request.image.shape))
        wait_s = self._worker.wait_s(request.client)
        return wait_s if wait_s > max(BUSY_S, BUSY_FACTOR * own_s) else None

    def fault(self) -> str | None:
        """Why nothing can be answered here any more; None where it can, however busy it is: it waits for nothing."""
        if (fault := self._worker.fault) is not None:
            return fault
        for pool in (self._unpackers, self._writers):
            try:
                pool.submit(int)  # no pool says in public whether it still works
            except RuntimeError as error:
                return f"a pool of threads takes no work: {error}"
        return None

    def close(self) -> None:
        self._worker.close()
        self._announcements.close()
        for pool in (self._unpackers, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _unpack(self, request: DecodeRequest) -> tuple[Unpacked, TilingPlan, int]:
        # Packed latents of one shape are many pictures, and hints move what a decode takes.
        hints = request.hints if request.hints.seed is None else replace(request.hints, seed=None)
        shape = (request.latents.shape, request.height, request.width, hints)
        if shape in self._familiar and request.latents.data.nbytes <= INLINE:
            return self._unpacked(request)
        unpacked = await _on(self._unpackers, self._unpacked, request)
        if len(self._familiar) < MOST_SHAPES:
            self._familiar.add(shape)
        return unpacked

    def _unpacked(self, request: DecodeRequest) -> tuple[Unpacked, TilingPlan, int]:
        """The latents, how they are decoded, and in which batch at most."""
        unpacked = self._processor.unpack_latents(request)
        shape = tuple(unpacked.latents.shape)
        plan = self._engine.plan_decode(shape, unpacked.hints)
        return unpacked, plan, self._engine.batch_limit(shape, plan, unpacked.hints)

    def _prepared(self, request: EncodeRequest) -> tuple[Prepared, TilingPlan]:
        """The pixels, and how they are encoded."""
        prepared = self._processor.preprocess_image(request)
        return prepared, self._engine.plan_encode(tuple(prepared.pixels.shape))

    def _provenance(self, how: Computed, stages: Iterable[tuple[str, float, float]]) -> Provenance:
        timings = tuple((stage, (end - start) * 1000) for stage, start, end in stages)
        dtype = str(how.dtype).removeprefix("torch.")
        return Provenance(self._model, self._engine.revision, dtype, timings, str(how.plan))


async def _on(pool: ThreadPoolExecutor, run: Callable[..., T], *arguments: Any) -> T:
    """What it returns, in a thread of the pool. Raises Unavailable where that takes no work any more."""
    try:
        running = asyncio.get_running_loop().run_in_executor(pool, run, *arguments)
    except RuntimeError as error:
        raise being_replaced() from error
    return await running


def _give_up(deadline_s: float | None, received: float) -> float | None:
    return None if deadline_s is None else received + deadline_s


def _check_deadline(give_up: float | None) -> None:
    """Before a result is written, as the device does before it begins. Raises DeadlineExceeded."""
    if give_up is not None and time.perf_counter() > give_up:
        raise DeadlineExceeded(TOO_LATE)
