"""A case as a served model: its module saved to a folder, loaded by the real engine, asked through the real `Pipeline`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_i2i

from families import images, video
from families.case import Case
from in_process import diffusers_engine, pipeline_of
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae.protocol.wire import Scaling
from remote_vae_serve.families.layouts import Layout
from remote_vae_serve.replica.device_job import Job

ALL = (*images.CASES, *video.CASES)
NOT_SERVED = {
    "AsymmetricAutoencoderKL: with the picture around the mask": "its decoder takes a picture and a mask beside the latents, "
    "which no request carries",
    "VQModel: Amused, numbers of codes": "its latents are whole numbers, codes of a book, which no request carries",
}
"""Cases that cannot be had, and why."""
CASES = tuple(case for case in ALL if case.name not in NOT_SERVED)
TOLERANCE = 2e-5
"""Of pixels in [0, 1], and of latents."""
WAIT_S = 300.0

HINTS = {"num_reference_images": "drop_frames", "additional_frames": "drop_frames", "channel_order": "patch_order"}
"""What our hints call the arguments of the pipelines."""
OF_CONFIG = ("scaling_factor", "shift_factor", "batch_norm_eps")
"""What a pipeline has a number of its own for."""
ENCODED_CHANNELS_LAST = ("AutoencoderKLHunyuanVideo: Kandinsky 5",)
"""Cases whose shape of latents has one reading for the decoder, and whose pipeline has its encoder's like that too."""
CHANNELS_LAST = Hints(layout="channels_last")
NOT_PATCHES = ("AutoencoderKLFlux2: Bria FIBO 2",)
"""Cases that keep encoded latents as they were before they were cut into patches and normalised as such."""
NOT_NORMALISED = ("AutoencoderTiny: DreamLite", "AutoencoderKLTemporalDecoder")
"""Cases whose pipelines do not scale what they encode."""
UNSCALED_BY_CONFIG = "VQModel"
"""Whose own convention does nothing; a pipeline that has a factor has to send it."""


def config_of(case: Case) -> dict[str, Any]:
    """`config` of the application."""
    if case.class_name == UNSCALED_BY_CONFIG:
        return {}
    return {name: value for name, value in case.parameters.items() if name in OF_CONFIG}


def hints_of(case: Case) -> Hints:
    """What its client sends beside the latents."""
    said: dict[str, Any] = {}
    for name, value in case.parameters.items():
        if name == "scaling":
            said["denormalized"] = True
        elif name not in ("height", "width", *OF_CONFIG):
            said[HINTS.get(name, name)] = value.replace(" ", "_") if isinstance(value, str) else value
    return Hints(**said)


class Served:
    """One case, in a replica's engine and pipeline. The event loop is a thread's of its own, so that many threads can ask.

    Args:
        folder: empty; the module is saved there.
        arguments: of `VAEConfig`; unless they say so, nothing is decoded in company.
    """

    def __init__(self, case: Case, folder: Path, **arguments: Any) -> None:
        case.build().save_pretrained(folder)
        self.case = case
        self.engine = diffusers_engine(folder, **{"config": config_of(case), "engine": "fast"} | arguments)
        self.pipeline = pipeline_of(self.engine)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.pipeline.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    @property
    def model(self) -> Any:
        """The module as the engine loaded it."""
        return self.engine._model(self.engine.dtype)

    def latents(self, count: int | None = None) -> torch.Tensor:
        """Those of the case; so many samples that differ, where a count is asked for."""
        latents = self.case.latents(self.case.build())
        if count is None:
            return latents
        other = torch.cat([latents, latents.flip(-1), latents * 0.75, latents.flip(-1) * 0.5])
        return other[:count].contiguous()

    def ask(self, latents: torch.Tensor, output: Output = Output.PT, number: int = 0) -> torch.Tensor:
        """What one request gets, of the sample of that number where there are others."""
        return to_torch(self._wait(self.pipeline.decode(self.request(latents, output, number))).tensor)

    def request(self, latents: torch.Tensor, output: Output = Output.PT, number: int = 0) -> DecodeRequest:
        said = self.case.parameters
        factor = said.get("scaling_factor") if self.case.class_name == UNSCALED_BY_CONFIG else None
        return DecodeRequest(
            from_array(latents), Scaling(own=True) if factor is None else Scaling(factor=factor), output,
            said.get("height"), said.get("width"), hints=hints_of(self.case).of_sample(number),
        )  # fmt: skip

    def decode(self) -> torch.Tensor:
        """The pixels of the case's latents as its reference has them. A reply holds one video."""
        latents = self.latents()
        if self.layout.media == "image":
            return self.ask(latents, Output.UNIT)
        videos = torch.stack([self.ask(one, Output.UNIT) for one in latents.split(1)])
        return videos.flatten(0, 1) if self.case.media == "image" else videos

    @property
    def layout(self) -> Layout:
        """That in which the server reads the case's latents."""
        return self.engine.processor.unpack_latents(self.request(self.latents())).layout

    def encode(self) -> torch.Tensor:
        """The latents of the case's pixels."""
        return to_torch(self._wait(self.pipeline.encode(self.encode_request())).tensor)

    def encode_request(self, pixels: torch.Tensor | None = None) -> EncodeRequest:
        """To encode those, or the pixels of the case."""
        encode = self.case.encode
        assert encode is not None
        scaling = Scaling() if self.case.name in NOT_NORMALISED else Scaling(own=True)
        hints = CHANNELS_LAST if self.case.name in ENCODED_CHANNELS_LAST else hints_of(self.case)
        raw = from_array(encode.pixels() if pixels is None else pixels)
        return EncodeRequest(raw, scaling, SampleMode(encode.mode), encode.seed, hints)

    def together(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """What each sample gets as a request of its own; the device is held until all of them wait for it."""
        device, held, go = self.pipeline._worker, threading.Event(), threading.Event()

        def hold(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
            held.set()
            assert go.wait(WAIT_S)
            return batch, None

        device.submit(Job(torch.zeros(1), hold, lambda part: None))
        assert held.wait(WAIT_S)
        ours = [self._start(self.pipeline.decode(self.request(one))) for one in latents.split(1)]
        until = time.monotonic() + WAIT_S
        while len(device._waiting) < len(ours):
            assert time.monotonic() < until
            time.sleep(0.002)
        go.set()
        return [to_torch(future.result(WAIT_S).tensor) for future in ours]

    def answer(self, request: DecodeRequest | EncodeRequest) -> Result:
        """What the replica's pipeline answers."""
        return self._wait(self.pipeline.answer(request))

    def _start(self, asked: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(asked, self._loop)

    def _wait(self, asked: Coroutine[Any, Any, Result]) -> Result:
        return self._start(asked).result(WAIT_S)


@contextmanager
def serving(case: Case, folder: Path, **arguments: Any) -> Iterator[Served]:
    """The case served, on one thread: another number rounds otherwise."""
    threads = torch.get_num_threads()
    served = Served(case, folder, **arguments)
    try:
        yield served
    finally:
        served.close()
        torch.set_num_threads(threads)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest; infinite where the shapes differ, so that nothing is broadcast."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.double() - theirs.double()).abs().max())


def no_noise(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
    """That pipeline draws the noise for a whole picture of its generator before it samples; the seed of a request is that of
    the sample."""
    return torch.zeros(shape)


def decode_difference(served: Served) -> float:
    case, module = served.case, served.case.build()
    return difference(served.decode(), case.reference(module, case.latents(module)))


def encode_difference(served: Served) -> float:
    case, module = served.case, served.case.build()
    assert case.encode is not None
    with patch.object(pipeline_kandinsky_i2i, "randn_tensor", no_noise):
        theirs = case.encode.reference(module, case.encode.pixels())
    return difference(served.encode(), Flux2Pipeline._patchify_latents(theirs) if case.name in NOT_PATCHES else theirs)
