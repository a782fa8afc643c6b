"""One decode measured: its time, its memory, and how far its pixels are from those of float32."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.meter import CardMemory, Meter
from benchmarks.gpu.models import Model, Size

WORST_PSNR_DB = 30.0
"""Below it a decode in half precision is taken for wrong. bfloat16, the coarser, is at 47 with narrow models' random weights."""


@dataclass(frozen=True)
class Way:
    """How a decoder is run.

    Attributes:
        channels_last: weights and latents lie with their channels last (`channels_last_3d` where they have five axes).
        compiled: the decoder goes through torch.compile, for one shape.
        benchmark: cuDNN tries its algorithms and takes the fastest, instead of guessing it.
    """

    name: str
    channels_last: bool = False
    compiled: bool = False
    benchmark: bool = False


WAYS = {
    way.name: way
    for way in (
        Way("eager"),
        Way("channels_last", channels_last=True),
        Way("compile", compiled=True),
        Way("compile_channels_last", channels_last=True, compiled=True),
        Way("cudnn_benchmark", benchmark=True),
    )
}


@dataclass(frozen=True)
class Compiler:
    """Of torch.compile."""

    backend: str = "inductor"
    mode: str = "default"

    def apply(self, module: torch.nn.Module) -> None:
        mode = {"mode": self.mode} if self.backend == "inductor" else {}
        module.compile(backend=self.backend, dynamic=False, fullgraph=False, **mode)


class Bench:
    """What decodes are measured with. It keeps each float32 result on the host, for several are compared with it.

    Args:
        device: `cuda` or `cpu`.
    """

    def __init__(self, device: str, clock: Clock, compiler: Compiler) -> None:
        self.device, self.clock, self.compiler = device, clock, compiler
        self._references: dict[tuple[str, str, str], torch.Tensor] = {}

    def decode(self, model: Model, dtype: str, size: Size, way: Way, tiled: bool) -> dict[str, Any]:
        """Milliseconds, bytes and differences. Raises whatever the decoder or the compiler does."""
        found, pixels = self._measured(model, dtype, size, way, tiled)
        free_memory(self.device)
        return found | {"difference": difference(pixels, self._in_float32(model, dtype, size))}

    def _measured(
        self, model: Model, dtype: str, size: Size, way: Way, tiled: bool
    ) -> tuple[dict[str, Any], torch.Tensor]:
        vae, latents = model.build(dtype, self.device), model.latents(size, dtype).to(self.device)
        if tiled:
            vae.enable_tiling()
        if way.channels_last:
            put_channels_last(vae)
            latents = channels_last(latents)
        found: dict[str, Any] = {"weights_bytes": sum(t.nbytes for t in (*vae.parameters(), *vae.buffers()))}

        @torch.inference_mode()
        def run() -> torch.Tensor:
            pixels: torch.Tensor = vae.decode(latents, return_dict=False)[0]
            return pixels

        with cudnn_choice(way.benchmark):
            if way.compiled:
                found["compile"] = self._compile(vae, run)
            found["ms"] = asdict(self.clock.times(run))
            memory, pixels = self._memory(vae, run, way)
        return found | memory, pixels

    def _compile(self, vae: Any, run: Callable[[], object]) -> dict[str, Any]:
        """What torch.compile did: a decoder that it gave up on, or cut into many graphs, runs eagerly without a word."""
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        self.compiler.apply(vae.decoder)
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, of lines in diffusers
            run()
        self.clock.synchronize()
        return {
            **asdict(self.compiler), "dynamic": False, "first_call_s": time.perf_counter() - began,
            "graphs": counters["stats"].get("unique_graphs", 0), "breaks": sum(counters["graph_break"].values()),
        }  # fmt: skip

    def _memory(self, vae: Any, run: Callable[[], torch.Tensor], way: Way) -> tuple[dict[str, int], torch.Tensor]:
        """Bytes beside the weights, of one more run; and its pixels, float32 on the host."""
        if self.device == "cuda":
            with CardMemory() as memory:
                pixels = run()
            return {"peak_bytes": memory.peak, "reserved_bytes": memory.reserved}, pixels.float().cpu()
        if way.compiled:  # a compiled decoder is not made of operations any more
            return {}, run().float()
        with Meter(known=(*vae.parameters(), *vae.buffers())) as meter:
            pixels = run()
        return {"peak_bytes": meter.peak}, pixels.float()

    def _in_float32(self, model: Model, dtype: str, size: Size) -> torch.Tensor:
        """What the same weights make in float32 of the same latents, whole, with no TF32 anywhere; on the host."""
        key = (model.name, dtype, str(size))
        if key not in self._references:
            latents = model.latents(size, dtype).float().to(self.device)
            vae = model.build("float32", self.device)
            with torch.inference_mode(), cudnn_choice(benchmark=False, tf32=False):
                self._references[key] = vae.decode(latents, return_dict=False)[0].cpu()
        return self._references[key]


def difference(pixels: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Of pixels in [-1, 1] from what they ought to be: PSNR in dB (None where they are equal) and the greatest difference."""
    if not bool(torch.isfinite(pixels).all()):
        return {"finite": False}
    apart = (pixels - reference).abs()
    square = float(apart.square().mean(dtype=torch.float64))
    return {
        "finite": True, "psnr_db": 10 * math.log10(4 / square) if square else None, "max": float(apart.max()),
        "reference_std": float(reference.std()),
    }  # fmt: skip


def is_wrong(found: dict[str, Any]) -> bool:
    """Whether a decode's difference is no rounding any more."""
    apart = found.get("difference", {"finite": True})
    return not apart["finite"] or (apart.get("psnr_db") or math.inf) < WORST_PSNR_DB


@contextmanager
def cudnn_choice(benchmark: bool, tf32: bool | None = None) -> Iterator[None]:
    """cuDNN's settings for a block; None leaves TF32 as torch has it."""
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.allow_tf32)
    cudnn.benchmark, cudnn.allow_tf32 = benchmark, before[1] if tf32 is None else tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.ndim]) if tensor.ndim in formats else tensor


def put_channels_last(module: torch.nn.Module) -> None:
    """Not `module.to(memory_format=...)`, which takes one format for all: Wan's decoder has convolutions of pictures, too."""
    for weight in module.parameters():
        weight.data = channels_last(weight.data)


def free_memory(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
