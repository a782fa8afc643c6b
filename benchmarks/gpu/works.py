"""What is measured, the most valuable first: a run that is cut off has the numbers that matter most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.decodes import WAYS, Bench, Way
from benchmarks.gpu.meter import Prediction
from benchmarks.gpu.models import Model, Size
from benchmarks.gpu.rates import matmul_rate, rates
from benchmarks.gpu.stages import stages

Found = dict[str, Any]
LARGEST_MATMUL, TINY_MATMUL = 8192, 256
ORDINARY = ("eager", "channels_last", "compile")
EXTRA = ("compile_channels_last", "cudnn_benchmark")


@dataclass(frozen=True)
class Work:
    """One measurement.

    Attributes:
        key: its name in the results, unique: `decode/<model>/<size>/<dtype>/<way>/<whole or tiled>` and the like.
        measure: what makes the record that stands there.
        on_device: whether it needs the device; a prediction does not.
    """

    key: str
    measure: Callable[[Bench], Found]
    on_device: bool = True


@dataclass(frozen=True)
class Cell:
    """A model, what it decodes in, and to which size."""

    model: Model
    dtype: str
    size: Size

    def __str__(self) -> str:
        return f"{self.model.name}/{self.size}/{self.dtype}"

    def decode(self, way: Way, tiled: bool = False) -> Work:
        return Work(
            f"decode/{self}/{way.name}/{'tiled' if tiled else 'whole'}",
            lambda bench: bench.decode(self.model, self.dtype, self.size, way, tiled),
        )

    def stages(self) -> Work:
        return Work(f"stages/{self}", lambda bench: stages(self.model, self.dtype, self.size, bench.clock))

    def prediction(self, tiled: bool = False) -> Work:
        def predict(bench: Bench) -> Found:
            vae = self.model.build(self.dtype, "meta")
            if tiled:
                vae.enable_tiling()
            prediction = Prediction(vae, self.model.latent_shape(self.size), getattr(torch, self.dtype))
            return {"peak_bytes": prediction.peak, "flops": prediction.flops}

        return Work(f"predict/{self}/{'tiled' if tiled else 'whole'}", predict, on_device=False)


def works(models: Sequence[Model], ways: Sequence[str], device: str = "cuda", tiny: bool = False) -> list[Work]:
    """In the order in which they are done, each once."""
    ordered = {work.key: work for work in _rates(device, tiny)}
    for cell in _leading(models):
        ordered |= {work.key: work for work in _around(cell, ways)}
    ordered |= {work.key: work for work in _the_rest(models, ways)}
    return list(ordered.values())


def _rates(device: str, tiny: bool) -> Iterator[Work]:
    edge = TINY_MATMUL if tiny else LARGEST_MATMUL
    for rate in rates(device):
        yield Work(f"matmul/{rate}", lambda bench, rate=rate: matmul_rate(rate, bench.clock, edge))  # type: ignore[misc]


def _leading(models: Sequence[Model]) -> list[Cell]:
    return [Cell(m, dtype, m.sizes[0]) for m in models if not m.is_video for dtype in m.dtypes]


def _around(cell: Cell, ways: Sequence[str]) -> Iterator[Work]:
    if "eager" in ways:
        yield cell.decode(WAYS["eager"])
        yield cell.decode(WAYS["eager"], tiled=True)
        yield cell.stages()
    for way in ORDINARY[1:]:
        if way in ways:
            yield cell.decode(WAYS[way])


def _the_rest(models: Sequence[Model], ways: Sequence[str]) -> Iterator[Work]:
    images = [Cell(m, dtype, size) for m in models if not m.is_video for size in m.sizes for dtype in m.dtypes]
    videos = [Cell(m, dtype, size) for m in models if m.is_video for dtype in m.dtypes for size in m.sizes]
    if "eager" in ways:
        for cell in (*images, *videos):
            yield cell.decode(WAYS["eager"])
            yield cell.decode(WAYS["eager"], tiled=True)
        for cell in videos:
            yield cell.stages()
    yield from (cell.prediction() for cell in (*images, *videos))
    for group in (images, videos):
        for way in ORDINARY[1:]:
            if way in ways:
                yield from (cell.decode(WAYS[way]) for cell in group)
    for way in EXTRA:
        if way in ways:
            yield from (cell.decode(WAYS[way]) for cell in _leading(models))
    if "eager" in ways:
        yield from (cell.stages() for cell in images)
        # Last: with thousands of small operations a tile, these take up to half a minute, and need no GPU at all.
        yield from (cell.prediction(tiled=True) for cell in (*images, *videos))
