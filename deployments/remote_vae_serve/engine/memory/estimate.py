"""`MemoryEstimator`: an estimate of the memory that a decode or an encode will take, from the model's own graph.

The graph is run on torch's meta device, where tensors have shapes and no values: what is alive at each step is counted exactly,
for every family alike, tiling included, in some 40 ms for a Stable Diffusion decoder of any size. Of tiles of one shape, and of
samples that are worked on one by one, only the first is run.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from remote_vae.errors import BadRequest
from remote_vae.protocol.output import Output
from remote_vae_serve.engine.operation import DECODE, ENCODE, Operation, run_of
from remote_vae_serve.engine.rewrites.table import rewriting
from remote_vae_serve.engine.tiling import UNTILED, TilingPlan, view
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.processing.postprocess import to_output

logger = logging.getLogger("ray.serve")

MOST_TILES = 4096
"""That are counted one by one, in a second. Of a plan with more a part is, and the rest in proportion: the decoder's own work,
which does not grow with the picture, is next to nothing there, and is counted too often, not too rarely."""
WORKSPACE = 2**28
"""Bytes that libraries take however small the operation: nothing is learned from them. The budget's reserve is there for them."""
MOST_EXCESS = 4.0
FAILURE, MOST_OF_FAILURES = 1.1, 1.5
"""A failure may be another process's fault: it alone never makes this one refuse what it could do."""


class MemoryEstimator:
    """Estimates the peak memory of decodes and encodes of one model, in bytes, on top of its weights. Thread-safe.

    Args:
        model: of the class and the dtype in question, on the meta device.
        space: what it says of its latents.
        pixels: the dtype that what it decodes is wanted in; None for its own.
        rewrites: the names of those that the engine runs it with.
    """

    def __init__(
        self, model: Any, space: LatentSpace, pixels: torch.dtype | None = None, rewrites: tuple[str, ...] = ()
    ) -> None:
        self._model = model
        self._rewrites = rewrites
        rewriting(rewrites).prepare(model)
        self._space = space
        self._running, self._learning = threading.Lock(), threading.Lock()
        self._excess = 1.0
        self._dtype = next(model.parameters()).dtype
        self._pixels = pixels or self._dtype
        self._counted = lru_cache(2048)(self._run)
        self._runs = lru_cache(2)(self._runs_on_meta)
        if (prepare := space.family.without_values) is not None:
            prepare(model)

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return int(sum(parameter.nbytes for parameter in self._model.parameters()))

    def decode(self, shape: tuple[int, ...], plan: TilingPlan) -> int:
        """Bytes at the peak of decoding latents of that shape, `[B, C, (T,) h, w]`, theirs included, and of bringing the pixels
        into the form that leaves the device; 0 where nothing is known. Raises BadRequest where the decoder cannot take them."""
        return self.of(DECODE, shape, plan)

    def encode(self, shape: tuple[int, ...], plan: TilingPlan = UNTILED) -> int:
        """Bytes at the peak of encoding pixels of that shape, `[B, 3, (T,) H, W]`, theirs included; 0 where nothing is known."""
        return self.of(ENCODE, shape, plan)

    def of(self, operation: Operation, shape: tuple[int, ...], plan: TilingPlan) -> int:
        """Bytes at the peak of an operation, as `decode` and `encode` say it; with the hints of the request."""
        return int(self._counted(operation.unseeded, shape, plan) * self._excess)

    def learn(self, predicted: int, taken: int) -> None:
        """Correct later estimates by what an operation took: workspaces of convolutions, fragmentation of the allocator.

        Args:
            predicted: bytes that were estimated; 0, for nothing known, teaches nothing.
            taken: bytes that the allocator held at the peak, less those before. Only more than predicted is learned.
        """
        if not predicted:
            return
        with self._learning:
            excess = self._excess * (taken - WORKSPACE) / predicted
            self._excess = min(MOST_EXCESS, max(self._excess, excess))

    def learn_of_failure(self) -> None:
        """Raise later estimates by a step (`FAILURE`), after an operation that ran out of memory: nobody knows how much was
        missing."""
        with self._learning:
            self._excess = max(self._excess, min(MOST_OF_FAILURES, self._excess * FAILURE))

    def _run(self, operation: Operation, shape: tuple[int, ...], plan: TilingPlan) -> int:
        try:
            return self._count(operation, shape, plan)
        except Exception as error:
            if (recover := self._space.family.recover) is not None:
                recover(self._model)
            if isinstance(error, BadRequest):
                raise
            if isinstance(error, (RuntimeError, ValueError)) and self._runs(operation.kind):
                raise BadRequest(
                    f"{operation.in_words} of shape {list(shape)} is more than {self._space.class_name} can do "
                    f"({self._space.family.name}): {_reason(error)}",
                    parameter="shape",
                ) from error
            # A decoder that looks at values has no forecast.
            logger.warning("nothing is known of the memory of %s: %s", type(self._model).__name__, error)
            return 0

    def _runs_on_meta(self, kind: Literal["decode", "encode"]) -> bool:
        """Whether the graph runs on shapes that nobody would call odd: only then is it the shape where it does not."""
        space = self._space
        of_time = space.family.takes_time or (kind == "decode" and space.family.media == "video")
        edges, frames = (16, 16), (8,)
        if kind == "encode":
            edges, frames = (16 * space.ratio, 16 * space.ratio), (1 + 2 * (space.temporal_ratio or 1),)
        channels = space.channels if kind == "decode" else space.pixel_channels
        try:
            self._count(Operation(kind), (1, channels, *(frames if of_time else ()), *edges), UNTILED)
        except Exception:
            return False
        return True

    def _count(self, operation: Operation, shape: tuple[int, ...], plan: TilingPlan) -> int:
        batch, *middle, height, width = shape
        ratio = self._space.ratio
        model = view(self._model, plan, self._space.family.tile, ratio)
        edges, in_tiles = (height, width), False
        if plan.tile is not None and model is not self._model:
            step = 1 if operation.kind == "decode" else ratio  # a part of a picture is one of whole latents
            tiles = math.prod(math.ceil(edge // step * ratio / plan.tile) for edge in edges)
            edges = _part_of(height // step, width // step, MOST_TILES / tiles)
            edges = edges[0] * step, edges[1] * step
            in_tiles = True
        at_once = 1 if plan.one_by_one else batch
        given = self._empty((at_once, *middle, *edges))
        # The lock is here, not around the cache: what is known already is told while another shape is being counted.
        with self._running, LiveBytes() as live, torch.inference_mode(), _FusedAttention():
            with _each_tile_once(model, operation.part, live) if in_tiles else nullcontext():
                # Anew for each: weights that rewrites derive at their first use are counted every time.
                made = run_of(operation, model, self._space, self._pixels, rewriting=rewriting(self._rewrites))(given)
            peak = int(given.nbytes + live.peak)
        if at_once < batch:
            made = made.new_empty((batch, *made.shape[1:]))
            peak += made.nbytes + given.nbytes * (batch - 1)
        if operation.kind == "decode":
            peak = max(peak, made.nbytes + _leaving(made))
        return math.ceil(peak * height * width / math.prod(edges))

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device="meta")


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _leaving(pixels: torch.Tensor) -> int:
    """Bytes that the largest output takes, made of pixels."""
    return max(peak_bytes(partial(to_output, pixels, output)) for output in (Output.UNIT, Output.UINT8))


def _part_of(height: int, width: int, share: float) -> tuple[int, int]:
    """The edges of a part of that share of the area, the shorter one kept as far as it goes."""
    if share >= 1:
        return height, width
    area = height * width * share
    short = max(1, min(height, width, int(math.sqrt(area))))
    long = max(short, int(area / short))
    return (short, long) if height <= width else (long, short)


@contextmanager
def _each_tile_once(model: Any, part: str, live: LiveBytes) -> Iterator[None]:
    """Run the decoder or the encoder of a view of a model on the meta device once for each shape of a tile: of the next one it is
    known.

    Blending is left out: what it makes, a few rows of pixels, is less than the picture that is put together after it.

    Not for several threads at once: the part is the model's own.
    """
    module = getattr(model, part)
    run = module.forward
    known: dict[str, tuple[int, Any, list[Any]]] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        key = repr(tree_map(_shape_of, (args, kwargs)))
        # Some keep features for the next frames in lists that are handed in.
        kept = [value for value in (*args, *kwargs.values()) if isinstance(value, list)]
        if key not in known:
            with LiveBytes() as own:
                made = run(*args, **kwargs)
            known[key] = own.peak, tree_map(_shape_of, made), [tree_map(_shape_of, values) for values in kept]
            return made
        peak, made, left = known[key]
        live.peak = max(live.peak, live.now + peak)
        for values, after in zip(kept, left, strict=True):
            values[:] = tree_map(_of_shape, after)
        return tree_map(_of_shape, made)

    model.blend_v = model.blend_h = lambda before, tile, extent: tile
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@dataclass(frozen=True)
class _Shape:
    """Of a tensor, in its place."""

    sizes: torch.Size
    dtype: torch.dtype


def _shape_of(value: Any) -> Any:
    return _Shape(value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def _of_shape(value: Any) -> Any:
    return torch.empty(value.sizes, dtype=value.dtype, device="meta") if isinstance(value, _Shape) else value


def on_meta(model_class: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model without its weights: nothing but its graph."""
    try:
        with torch.device("meta"):
            model = model_class.from_config(dict(config))
    except RuntimeError:  # of a constructor that reads a tensor's value (VidTok's quantiser)
        model = model_class.from_config(dict(config))
    # Not diffusers' own `to`, which warns of a cast that would make a difference to weights. To the device once more: a tensor
    # that `torch.Tensor(...)` makes does not hear of it.
    return torch.nn.Module.to(model, "meta", dtype).eval().requires_grad_(False)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at once while `run` ran; those it did not make do not count."""
    with LiveBytes() as live, torch.inference_mode(), _FusedAttention():
        run()
    return int(live.peak)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, from their making to their end, on any device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view of a weight makes nothing
        for storage in _storages(made):
            if storage._cdata not in given:
                self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Those of all tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, torch.Tensor):
        yield values.untyped_storage()
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _storages(value)
    elif isinstance(values, dict):
        yield from _storages(tuple(values.values()))


class _FusedAttention(TorchFunctionMode):
    """Attention as devices run it: without the matrix of scores, which the meta device would hold whole (1 GiB at 1024x1024)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = named["query"], named["value"]
            if not query.is_meta:
                return func(*args, **(kwargs or {}))
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
